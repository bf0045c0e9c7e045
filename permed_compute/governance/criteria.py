"""What a model must show before it is used on patients: the criteria file, read with every problem and its line.

Written before the evaluation is looked at, by the people who answer for the use; copied whole into the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from permed_compute.errors import Problem, SpecError
from permed_compute.spec import duplicate_keys, format_duration, key_lines, parse_duration

_Duration = Annotated[int, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Threshold(_Model):
    """`measure` as the evidence names it, e.g. `dice of lesion`. of: the worse end of its interval, or the mean."""

    measure: str = Field(min_length=1)
    least: float | None = None
    most: float | None = None
    of: Literal["interval", "mean"] = "interval"

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.least is None) == (self.most is None):
            raise ValueError("write either least or most")
        return self


class Subgroups(_Model):
    """Each group of these traits is judged by itself; one with fewer patients is not judged, and the record says so."""

    traits: tuple[str, ...] = Field(min_length=1)
    thresholds: tuple[Threshold, ...] = Field(min_length=1)
    least_patients: int = Field(5, ge=2)


class IntendedUse(_Model):
    """statement: patients, images, purpose and reader in words. workloads: that may use the model beside the one that
    made the predictions. free: params in which a use may differ from what was validated, because they change nothing
    of what is computed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    statement: str = Field(min_length=30)
    workloads: tuple[str, ...] = ()
    free: tuple[str, ...] = ()


class Institution(_Model):
    """What no record knows and MDR Article 5(5) asks for. The documentation says where it is missing."""

    name: str = ""
    address: str = ""
    quality_system: str = ""
    justification: str = ""
    requirements: str = ""
    review: str = ""


class Criteria(_Model):
    version: Literal[1] = 1
    title: str = Field(min_length=1, max_length=64)
    model: str = Field(min_length=1)
    intended_use: IntendedUse
    valid: _Duration = 365 * 86400
    least_patients: int = Field(ge=2)
    thresholds: tuple[Threshold, ...] = Field(min_length=1)
    subgroups: Subgroups
    institution: Institution = Institution()


def load(path: Path) -> Criteria:
    """The criteria in the file. Raises `SpecError` with every problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem("file", f"cannot be read ({error.__class__.__name__})")]) from None
    return loads(text, source=str(path))


def loads(text: str, *, source: str = "<text>") -> Criteria:
    """The same from YAML text."""
    import yaml

    try:
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise SpecError(source, [Problem("file", "not YAML", line=mark.line + 1 if mark else 0)]) from None
    if not isinstance(data, dict):
        raise SpecError(source, [Problem("file", "criteria are a mapping of keys to values", line=1)])
    twice = list(duplicate_keys(node, ()))
    if twice:
        raise SpecError(source, twice)
    try:
        return Criteria.model_validate(data)
    except ValidationError as error:
        lines = dict(key_lines(node, ()))
        rows, places = error.errors(), [row["loc"] for row in error.errors()]
        # A list without its wrong items is also too short for pydantic: the items say it better.
        own = [row for row in rows if not any(other[: len(row["loc"])] == row["loc"] != other for other in places)]
        raise SpecError(source, [_problem(row, lines) for row in own]) from None


def _problem(row: Any, lines: dict[tuple[str | int, ...], int]) -> Problem:
    where = tuple(row["loc"])
    line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), 0)
    what = "is no key of criteria" if row["type"] == "extra_forbidden" else row["msg"].removeprefix("Value error, ")
    return Problem(".".join(map(str, where)) or "file", what, line=line, remedy="See docs/validation.md.")
