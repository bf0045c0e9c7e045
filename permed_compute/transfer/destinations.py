"""The destinations file: where files may be sent to and fetched from, by name. The site or its user keeps it.

It holds no secret, and nothing is sent to an address that does not stand here: a slip of the hand on a command line
sends nobody's images anywhere.

    destinations:
      kista:
        kind: sftp                       # HUNT Cloud's kista: strictly one way
        direction: send                  # or receive: from this side
        host: kista.example.org          # an address, or a Host of ~/.ssh/config
        port: 2042
        user: kista-user
        folder: upload
        max_data_class: red              # nothing more sensitive goes there
      tsd:
        kind: tsd
        project: p11
        env: prod                        # as tsd-api-client names them: prod, alt, ec-prod, test, dev
        group: p11-member-group
        token_file: tsd.token            # mode 0600; or token_env: NAME
        max_data_class: black
      gate:
        kind: folder                     # a filsluse's share
        path: /mnt/filsluse
        signed: true                     # unsigned sets are not sent there
        volume: 2GiB                     # the largest file it takes
        max_data_class: red
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from permed_compute.errors import NotFoundError, PermissionDeniedError, Problem, SpecError
from permed_compute.spec import DataClass, key_lines, parse_memory

Direction = Literal["send", "receive"]
_SECRETS = ("password", "passwd", "token", "secret", "api_key", "key")
_ORDER = list(DataClass)


def _volume(value: Any) -> int:
    return parse_memory(value) << 20


class _Destination(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    max_data_class: DataClass
    signed: bool = False
    volume: Annotated[int, BeforeValidator(_volume)] = Field(
        0, description="bytes of the largest file it takes; 0: any"
    )
    direction: Direction | Literal["both"] = "both"


class FolderDestination(_Destination):
    kind: Literal["folder"]
    path: str = Field(min_length=1)


class SftpDestination(_Destination):
    kind: Literal["sftp"]
    direction: Direction
    host: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    port: int = Field(0, ge=0, lt=65536)
    user: str = Field("", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$|^$")
    folder: str = "."
    config: str = Field("", description="ssh_config to use instead of the user's")


class TsdDestination(_Destination):
    kind: Literal["tsd"]
    project: str = Field(pattern=r"^p[0-9]+$")
    env: Literal["prod", "alt", "ec-prod", "ec-test", "test", "int", "dev"] = "prod"
    group: str = Field("", pattern=r"^p[0-9]+-[a-z-]+$|^$")
    token_file: str = ""
    token_env: str = ""


Destination = FolderDestination | SftpDestination | TsdDestination
_ONE: TypeAdapter[Destination] = TypeAdapter(Annotated[Destination, Field(discriminator="kind")])


def read_destinations(path: Path) -> dict[str, Destination]:
    """The destinations of that file, by name; relative files in it start at its folder.

    Raises `NotFoundError`; `SpecError` naming all that is wrong with its line. Values are never quoted: one may be a
    misplaced password.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError):
        raise NotFoundError(
            "There is no destinations file.", remedy=f"Write {path}; docs/transfer.md has one to copy."
        ) from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise SpecError("destinations file", [Problem("file", "is not YAML", line=line)]) from None
    rows = data.get("destinations") if isinstance(data, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise SpecError("destinations file", [Problem("destinations", "is not a mapping of names to destinations")])
    lines, found, problems = dict(key_lines(node, ())), {}, []
    for name, row in rows.items():
        try:
            found[str(name)] = _located(_ONE.validate_python(row), path.resolve().parent)
        except ValidationError as error:
            problems += [_problem(str(name), item, lines) for item in error.errors(include_input=False)]
    problems += _both_ways(found)
    if problems:
        raise SpecError("destinations file", problems)
    return found


def _located(entry: Destination, folder: Path) -> Destination:
    files = {
        key: str(folder / getattr(entry, key)) for key in ("path", "config", "token_file") if getattr(entry, key, "")
    }
    return entry.model_copy(update=files)


def _problem(name: str, row: Any, lines: Mapping[tuple[str | int, ...], int]) -> Problem:
    where = ("destinations", name, *[step for step in row["loc"] if step not in ("folder", "sftp", "tsd")])
    line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), 0)
    what, remedy = str(row["msg"]).removeprefix("Value error, "), ""
    if row["type"] == "extra_forbidden":
        secret = str(where[-1]).lower() in _SECRETS
        what = "holds a secret, which no file of ours may" if secret else "is no key of this kind of destination"
        remedy = "Write token_file or token_env; SSH keys are your ssh's." if secret else "docs/transfer.md lists them."
    return Problem(".".join(map(str, where[1:])), what, line=line, remedy=remedy)


def _both_ways(found: Mapping[str, Destination]) -> list[Problem]:
    """One SFTP account and folder, declared in both directions: a kista goes one way for as long as it lives."""
    seen: dict[tuple[str, int, str, str], tuple[str, str]] = {}
    problems = []
    for name, entry in found.items():
        if isinstance(entry, SftpDestination):
            other, way = seen.setdefault((entry.host, entry.port, entry.user, entry.folder), (name, entry.direction))
            if way != entry.direction:
                remedy = "Order a kista of its own for the other way."
                problems.append(
                    Problem(f"{name}.direction", f"is the other way than {other}'s, the same one", 0, remedy)
                )
    return problems


def permit(name: str, entry: Destination, direction: Direction, data_class: DataClass | None = None) -> None:
    """Raise `PermissionDeniedError` where the destination is not for that direction, or not for such data."""
    if entry.direction not in ("both", direction):
        raise PermissionDeniedError(
            f"{name} goes one way: from here it is for {entry.direction}, not for {direction}.",
            remedy="Use another destination for the way back; one-way channels are never used both ways.",
        )
    if data_class is not None and _ORDER.index(data_class) > _ORDER.index(entry.max_data_class):
        raise PermissionDeniedError(
            f"{name} takes data up to {entry.max_data_class.value}; these are {data_class.value}.",
            remedy="Choose a destination for such data, or say --data-class if these are less sensitive.",
        )
