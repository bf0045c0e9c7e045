"""`permed validate`: is this a job? Every problem at once, with its line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import jobfile
from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session
from permed_compute.errors import PermedError, Problem, SpecError

if TYPE_CHECKING:
    from permed_compute.spec import JobSpec


def add_to(app: typer.Typer) -> None:
    app.command("validate")(validate)


def validate(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Job files, or names of shipped jobs.")],
    sets: jobfile.SetOption = None,
) -> None:
    """Check job files: every problem with its line and the nearest valid key.

    Example: permed validate job.yaml
    """
    from rich.markup import escape

    session = Session.of(ctx)
    rows = [_checked(file, sets) for file in files]

    def show(console: Any) -> None:
        for row in rows:
            if row["ok"]:
                console.print(f"[green]✓[/] {escape(row['file'])}: {escape(row['name'])}, {row['digest'][:12]}")
            else:
                console.print(f"[red]✗[/] {escape(row['file'])}")
            for problem in row["problems"]:
                console.print(f"    {escape(problem['text'])}")
            for note in row["notes"]:
                console.print(f"    [yellow]note:[/] {escape(note)}")

    session.answer(rows, show)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(Exit.USAGE)


def _checked(file: str, sets: list[str] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file, "ok": False, "problems": [], "notes": []}
    try:
        spec = jobfile.load(file, sets)
        known = workload_problem(spec)
        if known is not None:
            raise SpecError(file, [known])
    except SpecError as error:
        row["problems"] = [
            {"where": p.where, "line": p.line, "what": p.what, "remedy": p.remedy, "text": str(p)}
            for p in sorted(error.problems, key=lambda p: p.line)
        ]
        return row
    except PermedError as error:
        row["problems"] = [{"where": "file", "line": 0, "what": error.message, "remedy": error.remedy,
                            "text": str(error)}]  # fmt: skip
        return row
    return row | {"ok": True, "name": spec.name, "digest": spec.digest(), "notes": notes(spec)}


def workload_problem(spec: JobSpec) -> Problem | None:
    """A catalogue name that does not exist, with the nearest that does; a `module:function` is looked up only later."""
    from permed_compute.workloads.registry import CATALOG

    if ":" in spec.workload or spec.workload in CATALOG:
        return None
    near = difflib.get_close_matches(spec.workload, CATALOG, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Ours: {', '.join(sorted(CATALOG))}; yours: module:function."
    return Problem("workload", f"there is no workload {spec.workload!r}.", remedy=hint)


def notes(spec: JobSpec) -> list[str]:
    """What is no mistake in the file, but worth knowing: inputs and code that are not here (they may be elsewhere)."""
    absent = [
        f"input {ref.name!r} is not on this machine"
        for ref in spec.inputs
        if not (ref.transfer or Path(ref.path).exists())
    ]
    if spec.code and not Path(spec.code).is_dir():
        absent.append("the code folder is not on this machine")
    return absent
