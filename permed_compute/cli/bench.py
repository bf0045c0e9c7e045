"""`permed bench`: measure ours beside its peers, look at the page, compare two runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session
from permed_compute.cli.signals import terminate_like_ctrl_c
from permed_compute.errors import NotFoundError, SettingsError

# A group with one callback and no commands, so that it mounts like the other nouns and still takes NAME ….
app = typer.Typer(
    help="Measure ours beside its peers (from a checkout), or compare two runs.",
    invoke_without_command=True,
    context_settings={"allow_interspersed_args": True},
)

_NOT_BENCHMARKS = {"__init__", "harness"}
RESULT, PAGE = "bench.json", "index.html"


@app.callback()
def bench(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which; default all.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Name the benchmarks and stop.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller cases: does it run, not how fast is it.")] = False,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Measurements of each case.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and index.html.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="OLD NEW", help="Compare two runs and stop.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Folder of benchmarks; default the checkout's.")] = None,
) -> None:
    """Measure ours beside its peers, interleaved; write bench.json and one page with charts."""
    session = Session.of(ctx)
    if compare is not None:
        _compare(session, *compare)
        return
    modules = load_benchmarks(find_folder(folder), names or [])
    if list_them:
        rows = [{"name": name, "title": module.TITLE, "why": module.WHY} for name, module in modules.items()]
        session.answer(rows, *(f"[bold]{escape(row['name'])}[/]  {escape(row['title'])}" for row in rows))
        return
    _measure(session, modules, out, quick=quick, repeats=repeats)


def _measure(
    session: Session, modules: Mapping[str, ModuleType], out: Path | None, *, quick: bool, repeats: int
) -> None:
    from permed_compute.paths import write_json
    from permed_compute.reports.benchmarks import failures, render_benchmark_page

    harness = importlib.import_module("benchmarks.harness")
    with terminate_like_ctrl_c():  # what was measured by then is kept
        report = harness.run(modules, quick=quick, repeats=repeats, facts=_facts(), say=session.note)
    target = out or Path("bench-results") / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    write_json(target / RESULT, report)
    page = render_benchmark_page(report, target / PAGE)
    broken = failures(report)
    told = [f"[red]{escape(sentence)}[/]" for sentence in broken]
    session.answer(report, *_tables(report), *told, escape(str(page.resolve())))
    if report["interrupted"]:
        session.note("interrupted: the figures are of what was measured until then")
        raise typer.Exit(Exit.INTERRUPTED)
    if broken:
        raise typer.Exit(Exit.FAILED)


def _compare(session: Session, old_path: Path, new_path: Path) -> None:
    from dataclasses import asdict

    from permed_compute.reports.benchmarks import compare, differences

    old, new = read_run(old_path), read_run(new_path)
    rows, apart = compare(old, new), differences(old, new)
    value = {"rows": [asdict(row) for row in rows], "differences": apart}
    session.answer(value, *(f"[yellow]{escape(sentence)}[/]" for sentence in apart), _comparison(rows))


def read_run(path: Path) -> dict[str, Any]:
    """A run's JSON, given as the file or its folder. Raises `NotFoundError`, `SettingsError`."""
    file = path / RESULT if path.is_dir() else path
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        run["benchmarks"]
    except OSError:
        raise NotFoundError(
            f"There is no benchmark run at {path}.", remedy="`permed bench --out DIR` makes one."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise SettingsError(f"{file} is not a benchmark run.", remedy="`permed bench --out DIR` makes one.") from None
    return dict(run)


# --------------------------------------------------------------------------------------------- finding them


def find_folder(given: Path | None) -> Path:
    """`--dir`, else the checkout that this package runs from, else `benchmarks/` where one stands."""
    checkout = Path(__file__).resolve().parents[2] / "benchmarks"
    for folder in [given.absolute()] if given else [checkout, Path.cwd() / "benchmarks"]:
        if folder.is_dir():
            # benchmarks import their harness as `benchmarks.harness`; a folder elsewhere borrows the checkout's
            root = folder.parent if (folder / "harness.py").is_file() else checkout.parent
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return folder
    raise NotFoundError(
        f"There is no folder of benchmarks{f' at {given}' if given else ' here'}.",
        remedy="They stand in the source checkout, not in the wheel: clone it, or give --dir.",
    )


def load_benchmarks(folder: Path, names: list[str]) -> dict[str, ModuleType]:
    """The modules by name, in the order asked for (default: all, by name). Raises `NotFoundError`."""
    import difflib

    files = {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem not in _NOT_BENCHMARKS}
    for name in names:
        if name not in files:
            near = difflib.get_close_matches(name, files, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(files) or 'none yet'}."
            raise NotFoundError(f"There is no benchmark {name!r}.", remedy=hint)
    return {name: _load(name, files[name]) for name in (names or files)}


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", file)
    if spec is None or spec.loader is None:
        raise NotFoundError(f"{file.name} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what a case sends to another process is found again by its module's name
    spec.loader.exec_module(module)
    return module


def _facts() -> dict[str, Any]:
    from permed_compute.execution.results import code_state, machine, packages

    return {"machine": machine(), "packages": packages(), **code_state()}


# --------------------------------------------------------------------------------------------- showing them


def escape(text: str) -> str:
    """Words of others as words: square brackets are markup to Rich."""
    from rich.markup import escape as escaped

    return escaped(text)


def _tables(report: Mapping[str, Any]) -> Iterator[Any]:
    """One table per group: 80 columns hold the figures, not the headings beside them."""
    from rich.table import Table

    from permed_compute.reports.benchmarks import figure, spread

    for benchmark in report["benchmarks"]:
        if benchmark.get("left_out"):
            yield f"{escape(benchmark['name'])}: left out, {escape(benchmark['left_out'])}"
        for group in benchmark["groups"]:
            title = f"{escape(benchmark['name'])}: {escape(group['group'])} ({group['better']} is better)"
            table = Table("Case", title=title, title_justify="left")
            for column in ("Median", "Least – most", "CPU s", "MiB"):
                table.add_column(column, justify="right")
            table.add_column("Goal")
            goals = {goal["case"]: goal for goal in group["goals"]}
            for case in group["cases"]:
                name = escape(f"{case['name']} (peer)" if case["peer"] else case["name"])
                if case.get("n"):
                    table.add_row(
                        name, figure(case["median"], group["unit"]), spread(case, group["unit"]),
                        f"{case['cpu_s']:.2f}", f"{case['rss_mib']:.0f}", _goal(goals.get(case["name"])),
                    )  # fmt: skip
                else:
                    table.add_row(name, "–", "–", "–", "–", escape(case.get("error") or case.get("left_out") or ""))
            yield table


def _goal(goal: Mapping[str, Any] | None) -> str:
    if goal is None:
        return ""
    word = {True: "[green]met[/]", False: "[red]missed[/]", None: "not compared"}[goal["met"]]
    return f"{escape(goal['goal'])} {word}".strip()


def _comparison(rows: Any) -> Any:
    from rich.table import Table

    from permed_compute.reports.benchmarks import figure

    colours = {"better": "green", "worse": "red"}
    table = Table("Benchmark", "What", "Case")
    for column in ("Old", "New", "New ÷ old"):
        table.add_column(column, justify="right")
    table.add_column("Verdict")
    for row in rows:
        old, new = ("–" if value is None else figure(value, row.unit) for value in (row.old, row.new))
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        colour = colours.get(row.verdict, "default")
        table.add_row(
            *(escape(text) for text in (row.benchmark, row.group, row.case)),
            old,
            new,
            ratio,
            f"[{colour}]{row.verdict}[/]",
        )
    return table
