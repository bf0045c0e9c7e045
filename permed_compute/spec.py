"""JobSpec: what a user asks for. Frozen, versioned, validated with line numbers; imports nothing heavy.

A job file is YAML (or JSON, which YAML reads). `load(path)` names everything that is wrong at once, each with its
line and, for a misspelt key, the nearest valid one. Quantities carry their unit in the text (`4GiB`, `30m`): a bare
number is refused, because a reader cannot tell minutes from seconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from permed_compute.errors import Problem, SpecError

# --------------------------------------------------------------------------------------------- quantities

_MEMORY_UNITS = {"MiB": 1, "GiB": 1024, "TiB": 1024 * 1024}
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_memory(text: Any) -> int:
    """`'4GiB'` → 4096 (MiB). Binary units only: sites count memory in GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(text)) if not isinstance(text, bool) else None
    if match is None or match[2] not in _MEMORY_UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write it with a unit, e.g. 512MiB, 4GiB or 1TiB")
    return round(float(match[1]) * _MEMORY_UNITS[match[2]])


def format_memory(mib: int) -> str:
    """4096 → `'4GiB'`: the largest unit that loses nothing."""
    for unit in ("TiB", "GiB"):
        if mib and mib % _MEMORY_UNITS[unit] == 0:
            return f"{mib // _MEMORY_UNITS[unit]}{unit}"
    return f"{mib}MiB"


def parse_duration(text: Any) -> int:
    """`'1h30m'` → 5400 (seconds)."""
    parts = re.findall(r"(\d+)([smhd])", str(text))
    if not parts or "".join(n + u for n, u in parts) != str(text).replace(" ", ""):
        raise ValueError(f"{text!r} is not a duration; write it with units, e.g. 90s, 30m, 2h or 1d12h")
    return sum(int(n) * _TIME_UNITS[u] for n, u in parts)


def format_duration(seconds: int) -> str:
    """5400 → `'1h30m'`."""
    out, left = "", seconds
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _TIME_UNITS[unit])
        out += f"{count}{unit}" if count else ""
    return out or "0s"


def parse_workers(value: Any) -> Any:
    """`4` or `'1..8'` → `{'min': …, 'max': …}`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"min": value, "max": value}
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", value)
        if match is None:
            raise ValueError(f"{value!r} is not a number of workers; write 4, or 1..8 for an elastic job")
        return {"min": int(match[1]), "max": int(match[2] or match[1])}
    return value


Memory = Annotated[int, BeforeValidator(parse_memory), PlainSerializer(format_memory, return_type=str)]
Duration = Annotated[int, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)]

# --------------------------------------------------------------------------------------------- vocabulary


class Band(StrEnum):
    """Priority bands, highest first."""

    CLINICAL = "clinical"
    RESEARCH = "research"
    OPPORTUNISTIC = "opportunistic"


class Purpose(StrEnum):
    CARE = "care"
    QUALITY = "quality"
    RESEARCH = "research"


class DataClass(StrEnum):
    """How sensitive the data are: green open, yellow internal, red personal health data, black strictly protected."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"
    BLACK = "black"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_ACCOUNT = r"^[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_-]*)*$"
_SCHEME = "transfer:"
_TRANSFER = re.compile(rf"{_SCHEME}({_NAME[1:-1]})(/.+)?", re.DOTALL)
_ELEVEN_DIGITS = re.compile(r"(?<!\d)\d{6}\s?\d{5}(?!\d)")


class DataRef(_Model):
    """An input by reference: a file or folder, read only where it stands. `path: x` or just `x` in the file.

    `transfer:NAME` is the set of files that `permed receive` puts in place under that name, or whose reference begins
    so; `transfer:NAME/a/b` is what stands there in it. The job waits until it is in place.
    """

    path: str = Field(
        min_length=1,
        description="file or folder; relative paths start at the job file's folder; transfer:NAME is a received set",
    )
    name: str = Field("input", pattern=_NAME, description="how the workload asks for it")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _nameable(cls, value: str) -> str:
        if not value.startswith(_SCHEME):
            return value
        match = _TRANSFER.fullmatch(value)
        if match is None or {"", ".", ".."} & set((match[2] or "/x")[1:].split("/")):
            raise ValueError(f"{value!r} names no received set; write transfer:NAME, or transfer:NAME/folder/file")
        return value

    @property
    def transfer(self) -> str:
        """The set of files that is named; '' for a path."""
        match = _TRANSFER.fullmatch(self.path)
        return match[1] if match else ""

    def within(self, folder: Path) -> Path:
        """The file or folder that is meant, of a set that stands in `folder`."""
        match = _TRANSFER.fullmatch(self.path)
        return folder / (match[2] or "/")[1:] if match else Path(self.path)


class Workers(_Model):
    """How many workers: min = max for a gang or a rigid map job, a range for an elastic one."""

    min: int = Field(1, ge=1, le=4096)
    max: int = Field(1, ge=1, le=4096)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers {self.min}..{self.max}: the smaller number stands first")
        return self


class Resources(_Model):
    """What each worker needs. Admission reserves it; the executor holds the worker to it."""

    workers: Annotated[Workers, BeforeValidator(parse_workers)] = Workers()
    cpus: float = Field(1, gt=0, le=1024, description="CPU cores per worker, in steps of 0.001")
    memory: Memory = Field(2048, description="per worker, e.g. 4GiB")
    gpus: float = Field(0, ge=0, le=16, description="GPUs per worker; a fraction shares one")
    gpu_memory: Memory = Field(0, description="least GPU memory per GPU, e.g. 16GiB")
    flavors: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], ...] = Field(
        (), description="in order of preference, e.g. [h100, a100, cpu]; `gpu` is any GPU; leave cpu out to forbid it"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        gpu_flavors = [flavor for flavor in self.flavors if flavor != "cpu"]
        if self.gpus == 0 and gpu_flavors:
            raise ValueError(f"flavors name {gpu_flavors} but gpus is 0; write gpus: 1, or flavors: [cpu]")
        if self.gpus == 0 and self.gpu_memory:
            raise ValueError("gpu_memory is set but gpus is 0; write gpus: 1")
        if self.gpus and self.flavors and not gpu_flavors:
            raise ValueError(f"gpus is {self.gpus:g} but the only flavor is cpu; name a GPU flavor such as gpu or h100")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus:g}: above one, whole GPUs only")
        if len(set(self.flavors)) != len(self.flavors):
            raise ValueError(f"flavors {list(self.flavors)}: each once")
        return self

    @property
    def cpu_milli(self) -> int:
        return max(1, round(self.cpus * 1000))

    @property
    def gpu_milli(self) -> int:
        return round(self.gpus * 1000)

    @property
    def order(self) -> tuple[str, ...]:
        """Flavors in the order they are tried: what the job says, else any GPU where it asks for one, else cpu."""
        return self.flavors or (("gpu",) if self.gpus else ("cpu",))


class JobSpec(_Model):
    """One job. Everything that decides what is computed, where it may run, and on whose account."""

    version: Literal[1] = 1
    name: str = Field(pattern=_NAME, description="for people; no patient identifiers")
    workload: str = Field(
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$|^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="a catalogue name such as radiology/brain-extraction, or your own module:function",
    )
    code: str = Field("", description="folder with your own module; its digest is recorded")
    account: str = Field("local", pattern=_ACCOUNT, description="e.g. helse/sor-ost/ous/crai")
    legal_entity: str = Field("local", pattern=_ACCOUNT, description="who answers for the data")
    band: Band = Band.RESEARCH
    purpose: Purpose = Purpose.RESEARCH
    data_class: DataClass = DataClass.RED
    inputs: tuple[DataRef, ...] = ()
    params: Mapping[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()
    time_limit: Duration = Field(3600, description="e.g. 30m; the job is stopped at it, with its checkpoint kept")
    continuations: int = Field(
        0, ge=0, le=1000, description="how often it goes on from its checkpoint after reaching time_limit"
    )
    deadline: datetime | None = Field(None, description="ISO 8601 with a time zone; orders clinical batches by slack")
    retries: int = Field(2, ge=0, le=20, description="per part, and of attempts lost to a fault of the machine")
    dependencies: tuple[str, ...] = Field((), description="ids of jobs that must have succeeded")
    array: tuple[Mapping[str, Any], ...] = Field((), description="one element per entry; each overrides params")
    seed: int = Field(0, ge=0, lt=2**63)
    urgency: Literal["planned"] = "planned"

    @field_validator("urgency", mode="before")
    @classmethod
    def _never_acute(cls, value: Any) -> Any:
        if value == "acute":
            raise ValueError(
                "acute work is refused: a shared queue promises no answer within minutes, and Norway's strategy says"
                " that heavy compute is not for acute cases; use the department's own workstation, or band: clinical"
                " with a deadline"
            )
        return value

    @field_validator("array", mode="before")
    @classmethod
    def _array_of(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= 1_000_000:
                raise ValueError(f"array: {value} is not between 1 and 1000000")
            return tuple({"index": i} for i in range(value))
        return value

    @field_validator("deadline")
    @classmethod
    def _zoned(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"deadline {value.isoformat()} has no time zone; write e.g. 2026-11-21T06:00:00+01:00")
        return value

    @field_validator("name")
    @classmethod
    def _no_identifier(cls, value: str) -> str:
        if _ELEVEN_DIGITS.search(value):
            raise ValueError("the name contains eleven digits like a national identity number; names are logged")
        return value

    @field_validator("time_limit")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("time_limit must be at least 1s")
        return value

    # ------------------------------------------------------------------------------------- derived

    def canonical(self) -> str:
        """Canonical JSON: the bytes that the digest is taken of, and what the queue stores."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def scope(self) -> tuple[str, str, str, str]:
        """(legal entity, account, purpose, data class): finished parts are never shared across scopes."""
        return self.legal_entity, self.account, self.purpose.value, self.data_class.value

    @property
    def transfers(self) -> tuple[str, ...]:
        """The sets of files that the inputs name, each once."""
        return tuple(dict.fromkeys(ref.transfer for ref in self.inputs if ref.transfer))

    def element(self, index: int) -> JobSpec:
        """Element `index` of an array as a job of its own: its entry laid over `params`."""
        if not self.array:
            return self
        return self.model_copy(update={"params": {**self.params, **self.array[index]}, "array": ()})

    def resolved(self, folder: Path) -> JobSpec:
        """The same job with `inputs` (but for received sets) and `code` as absolute paths, relative ones starting at
        `folder`."""
        inputs = tuple(
            ref if ref.transfer else ref.model_copy(update={"path": str((folder / ref.path).resolve())})
            for ref in self.inputs
        )
        code = str((folder / self.code).resolve()) if self.code else ""
        return self.model_copy(update={"inputs": inputs, "code": code})


# --------------------------------------------------------------------------------------------- reading


def from_json(text: str) -> JobSpec:
    """A spec that `canonical()` wrote. No line numbers: it was valid when it was stored."""
    return JobSpec.model_validate_json(text)


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> JobSpec:
    """Read a job file; relative inputs are resolved against its folder.

    `overrides` are dotted keys (`resources.cpus`) laid over the file, as `--set` gives them.
    Raises `SpecError` with every problem, its line and the nearest valid key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem("file", f"cannot be read ({error.__class__.__name__})")]) from None
    return loads(text, source=str(path), overrides=overrides).resolved(path.resolve().parent)


def loads(text: str, *, source: str = "<text>", overrides: Mapping[str, Any] | None = None) -> JobSpec:
    """A spec from YAML text. Raises `SpecError`."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"not YAML: {getattr(error, 'problem', None) or error.__class__.__name__}"
        raise SpecError(source, [Problem("file", what, line=mark.line + 1 if mark else 0)]) from None
    if not isinstance(data, dict):
        raise SpecError(source, [Problem("file", "a job is a mapping of keys to values", line=1)])
    duplicates = list(duplicate_keys(node, ()))
    if duplicates:
        raise SpecError(source, duplicates)
    for key, value in (overrides or {}).items():
        _lay_over(data, key.split("."), value)
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        lines = dict(key_lines(node, ()))
        raise SpecError(source, [_problem(row, lines) for row in error.errors()]) from None


def _lay_over(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = data.setdefault(key, {})
        if not isinstance(below, dict):
            below = data[key] = {}
        data = below
    data[keys[-1]] = value


def key_lines(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    import yaml

    if node is None:
        return
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            for where, line in key_lines(value, (*path, key.value)):
                if where != (*path, key.value):
                    yield where, line
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from key_lines(value, (*path, index))


def duplicate_keys(node: Any, path: tuple[str | int, ...]) -> Iterator[Problem]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            where = (*path, key.value)
            line = key.start_mark.line + 1
            if key.value in seen:
                yield Problem(_dotted(where), f"is written twice (first on line {seen[key.value]})", line=line)
            seen.setdefault(key.value, line)
            yield from duplicate_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from duplicate_keys(value, (*path, index))


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(step) for step in path) or "file"


def _problem(row: Any, lines: Mapping[tuple[str | int, ...], int]) -> Problem:
    path = tuple(row["loc"])
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 0)
    if row["type"] == "extra_forbidden":
        valid = sorted(_fields_at(path[:-1]))
        near = difflib.get_close_matches(str(path[-1]), valid, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Valid keys here: {', '.join(valid)}."
        return Problem(_dotted(path), "is not a key that a job has.", line=line, remedy=hint)
    what = str(row["msg"]).removeprefix("Value error, ")
    return Problem(_dotted(path), what, line=line)


def _fields_at(path: tuple[str | int, ...]) -> set[str]:
    places: dict[tuple[str | int, ...], type[_Model]] = {
        (): JobSpec,
        ("resources",): Resources,
        ("resources", "workers"): Workers,
    }
    model: type[_Model] = DataRef if path[:1] == ("inputs",) else places.get(path, JobSpec)
    return set(model.model_fields)
