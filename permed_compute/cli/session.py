"""What every command gets: the settings, a client, and one way to answer (a table for people, JSON for programs)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from permed_compute.errors import PermedError, SpecError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from permed_compute.client import Client
    from permed_compute.settings import Settings

_PIPED_WIDTH = 4096
"""What reads a pipe wants whole ids and paths, not lines that fit 80 columns."""


@dataclass
class Session:
    """One run of the program. Answers go to stdout, everything else (progress, notes, errors) to stderr."""

    as_json: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)
    via: str = ""
    """`ssh:HOST` where the command is for another machine."""

    @classmethod
    def of(cls, ctx: typer.Context) -> Session:
        return ctx.find_object(cls) or cls()

    @cached_property
    def settings(self) -> Settings:
        from permed_compute.settings import resolve

        return resolve(self.flags)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """This home's controller, or a connection to it."""
        from permed_compute.client import open_client

        with open_client(self.settings) as client:
            yield client

    @cached_property
    def out(self) -> Console:
        return _console(stderr=False)

    @cached_property
    def err(self) -> Console:
        return _console(stderr=True)

    def answer(self, value: Any, *show: RenderableType | Callable[[Console], None]) -> None:
        """The command's one answer: `value` as JSON, or what `show` renders."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()
            return
        for item in show:
            if callable(item) and not hasattr(item, "__rich__"):
                item(self.out)
            else:
                self.out.print(item)

    def line(self, value: Any) -> None:
        """One of many answers, as a line of JSON."""
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()

    def note(self, sentence: str) -> None:
        """A remark beside the answer, for people only; shown as it is."""
        if not self.as_json:
            self.err.print(sentence, markup=False)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def show_error(error: PermedError, *, as_json: bool) -> None:
    """What was wrong, where, and what to do; on stderr."""
    if as_json:
        sys.stderr.write(json.dumps(error.as_dict(), ensure_ascii=False) + "\n")
        return
    from rich.markup import escape

    console = _console(stderr=True)
    if isinstance(error, SpecError):
        console.print(f"[bold red]{escape(error.source)} is not a job[/]: {len(error.problems)} to mend")
        for problem in sorted(error.problems, key=lambda problem: problem.line):
            console.print(f"  {escape(str(problem))}")
    else:
        console.print(f"[bold red]{escape(error.message)}[/]")
    if error.remedy:
        console.print(f"[green]→[/] {escape(error.remedy)}")
