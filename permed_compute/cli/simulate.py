"""`permed simulate`: what would happen under another policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session
from permed_compute.errors import SettingsError

if TYPE_CHECKING:
    from permed_compute.admission.policy import Policy
    from permed_compute.admission.simulate import Outcome
    from permed_compute.admission.traces import Trace

REPORT, PAGE = "simulation.json", "index.html"


def add_to(app: typer.Typer) -> None:
    app.command("simulate")(simulate)


def simulate(
    ctx: typer.Context,
    trace: Annotated[Path | None, typer.Option(help="A trace: our CSV, or a dump of `sacct -P`.")] = None,
    history: Annotated[int | None, typer.Option(min=1, metavar="DAYS", help="This home's own last days.")] = None,
    hospital_day: Annotated[bool, typer.Option("--hospital-day", help="A synthetic day of four regions.")] = False,
    days: Annotated[int, typer.Option(min=1, max=60, help="Days of --hospital-day.")] = 1,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="`now`, a quota file, fifo, easy, drf, nris-age or tiresias-las; several to compare."),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A change to the first policy: helse/nord.gpu:nominal+=8.")
    ] = None,
    nodes: Annotated[str | None, typer.Option(help="The pool, e.g. 16x4:a100+8x0; default the trace's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the hospital day, of what is laid over traces, and of faults.")] = 0,
    cycle: Annotated[str, typer.Option(help="Decisions are so far apart.")] = "30s",
    node_losses: Annotated[int, typer.Option(min=0, help="So many nodes fail for half an hour each.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for simulation.json and index.html.")] = None,
) -> None:
    """Run a trace under one policy or several on a virtual clock; show who gains and who loses.

    Example: permed simulate --hospital-day --set 'helse/nord.gpu:nominal+=8' --set 'uh/uio.gpu:lending_limit-=16'
    """
    from permed_compute.admission.measures import series, shifts, summary
    from permed_compute.admission.whatif import promised
    from permed_compute.paths import write_json
    from permed_compute.reports.simulation import render_simulation_page

    session = Session.of(ctx)
    work = _trace(session, trace, history, days if hospital_day else 0, seed, nodes)
    base = _base_policy(session, work)
    runs, notes = [], [f"Left out of the trace: {count} {why}." for why, count in work.left_out.items()]
    for name, known, run in _runs(session, work, base, policy or ["now"], change or [], seed, cycle, node_losses):
        session.note(f"{name} …")
        outcome = run()
        runs.append({**summary(outcome, known), "series": series(outcome)})
        over = promised(known, outcome.capacity)
        notes += [f"{name}: {over}"] if over else []
        if runs[-1]["unfinished"]:
            notes.append(f"{name}: {runs[-1]['unfinished']} jobs fit nowhere or were still running at the end.")
    found = [
        {**row, "policy": run["policy"]}
        for run in runs[1:] for by in ("sector", "region", "band") for row in shifts(runs[0], run, by)
    ]  # fmt: skip
    report = {"trace": work.name, "recipe": work.recipe, "seed": seed, "notes": notes, "runs": runs, "shifts": found}
    target = out or Path("simulation")
    write_json(target / REPORT, report)
    page = render_simulation_page(report, target / PAGE)
    session.answer(report, _comparison(runs), *([_shifts(found)] if found else []), *notes, str(page.resolve()))


def _trace(session: Session, file: Path | None, history: int | None, days: int, seed: int, nodes: str | None) -> Trace:
    from dataclasses import replace

    from permed_compute.admission import traces

    if sum((file is not None, history is not None, days > 0)) != 1:
        raise SettingsError("Say what to simulate.", remedy="One of --trace FILE, --history DAYS, --hospital-day.")
    if days:
        found = traces.hospital_day(seed=seed, days=days)
    elif file is not None:
        found = traces.read(file, **({} if "sacct" in file.name or not _is_csv(file) else {"seed": seed}))
    else:
        found = _history(session, history or 0)
    if nodes:
        found = replace(found, nodes=traces.parse_machines(nodes))
    if not found.nodes:
        raise SettingsError(
            "The trace does not say what it ran on.", remedy="Give the pool: --nodes 16x4:a100 (16 nodes of 4 GPUs)."
        )
    return found


def _is_csv(file: Path) -> bool:
    return file.suffix == ".csv"


def _history(session: Session, days: int) -> Trace:
    """This home's own past, on the nodes that its log last noted."""
    from dataclasses import replace

    from permed_compute.admission import traces
    from permed_compute.admission.fold import node_from_row
    from permed_compute.queue.port import wall_clock

    with session.client() as client:
        events = client.service.events()
        specs = {job.id: job.spec for job in client.service.jobs()}
    found = traces.of_history(events, specs.get, since=wall_clock() - days * traces.DAY_MS)
    noted = [event.data["nodes"] for event in events if event.reason == "nodes"]
    return replace(found, nodes=tuple(node_from_row(row) for row in noted[-1])) if noted else found


def _base_policy(session: Session, work: Trace) -> Policy:
    """What `now` means: the trace's own policy, or for one's own history the one in force."""
    from permed_compute.admission.policy import Policy

    if work.name == "history":
        with session.client() as client:
            applied = [event.data["policy"] for event in client.service.events() if event.reason == "policy"]
        return Policy.from_row(applied[-1]) if applied else Policy()
    return work.policy or Policy()


def _runs(
    session: Session, work: Trace, base: Policy, names: list[str], changes: list[str], seed: int, cycle: str,
    node_losses: int,
) -> list[tuple[str, Policy, Callable[[], Outcome]]]:  # fmt: skip
    from permed_compute.admission.baselines import BASELINES
    from permed_compute.admission.decide import decide
    from permed_compute.admission.quotafile import load
    from permed_compute.admission.simulate import Faults, Rules, Simulation
    from permed_compute.admission.whatif import changed
    from permed_compute.queue.memory import MemoryQueue

    rules, faults = Rules(cycle=words.duration(cycle) * 1000), Faults(seed=seed, node_losses=node_losses)
    found: list[tuple[str, Policy, Any]] = []
    for name in names:
        if name in BASELINES:
            found.append((name, base, BASELINES[name]))
        elif name == "now":
            found.append((name, base, decide))
        else:
            found.append((Path(name).stem, load(Path(name)), decide))
    if changes:
        first = next((known for _, known, rule in found if rule is decide), base)
        found.append(("changed", changed(first, changes), decide))

    def run(name: str, known: Policy, rule: Any) -> Callable[[], Outcome]:
        return lambda: Simulation(work, known, MemoryQueue, decide=rule, rules=rules, faults=faults, name=name).run()

    return [(name, known, run(name, known, rule)) for name, known, rule in found]


def _comparison(runs: list[dict[str, Any]]) -> Any:
    from permed_compute.reports.simulation import COLUMNS, shown

    table = words.table("POLICY", *(heading.upper() for _, heading, _ in COLUMNS))
    for run in runs:
        table.add_row(run["policy"], *(shown(run[key], unit) for key, _, unit in COLUMNS))
    return table


def _shifts(rows: list[dict[str, Any]]) -> Any:
    table = words.table("WHO", "BY", "JOBS", "WAIT BEFORE", "AFTER", "COMPLETION BEFORE", "AFTER", "")
    for row in rows:
        verdict = "sooner" if row["change_s"] < -1 else "later" if row["change_s"] > 1 else "same"
        spans = (row[f"{what}_{when}_s"] for what in ("wait", "completion") for when in ("before", "after"))
        table.add_row(row["name"], row["by"], str(row["jobs"]), *(words.span(span) for span in spans), verdict)
    return table
