"""Checks a job's `params` against a frozen dataclass of defaults: every problem at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar

from permed_compute.errors import Problem, SpecError

T = TypeVar("T")


class Checked(Generic[T]):
    """`Checked(workload, given, Params)`: unknown names and wrong types are problems; `done()` makes the object.

    A default of None allows nothing but text; a whole default allows a whole number, a float one any number.
    """

    def __init__(self, workload: str, given: Mapping[str, Any], kind: type[T]) -> None:
        self._kind = kind
        self._given = dict(given)
        self._problems: list[Problem] = []
        defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
        for name, value in given.items():
            if name not in defaults:
                names = ", ".join(defaults)
                self.problem(name, f"is not a parameter of {workload}.", f"Write one of {names}.")
            elif not _fits(value, defaults[name]):
                self.problem(name, f"is {value!r}; its default is {defaults[name]!r}.")

    def problem(self, name: str, what: str, remedy: str = "") -> None:
        self._problems.append(Problem(f"params.{name}", what, remedy=remedy))

    def one_of(self, name: str, *allowed: Any) -> None:
        if name in self._given and self._given[name] not in allowed:
            self.problem(name, f"is {self._given[name]!r}.", f"Write one of {', '.join(repr(a) for a in allowed)}.")

    def between(self, name: str, low: float, high: float) -> None:
        value = self._given.get(name)
        if isinstance(value, int | float) and not low <= value <= high:
            self.problem(name, f"is {value}, not between {low:g} and {high:g}.")

    def done(self) -> T:
        if self._problems:
            raise SpecError("params", self._problems)
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in self._given.items()}
        return self._kind(**known)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)
