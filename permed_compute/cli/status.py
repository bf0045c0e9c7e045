"""`permed status`: what the machine holds and for whom; or everything about one job."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import live, words
from permed_compute.cli.session import Session
from permed_compute.paths import read_json
from permed_compute.states import ENDED, LIVE, JobState

if TYPE_CHECKING:
    from permed_compute.client import Client
    from permed_compute.queue.port import Job

_PARTS_SHOWN = 30
_OVER = ENDED | {JobState.HELD}


def add_to(app: typer.Typer) -> None:
    app.command("status")(status)


def status(
    ctx: typer.Context,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Job id; without one, the overview.")] = None,
    every_part: Annotated[bool, typer.Option("--parts", help="Show every part, not only the first 30.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again every 2 s: until Ctrl-C, or until the job"
                                                             " has ended.")] = False,
) -> None:  # fmt: skip
    """Show what runs and what it uses, what is reserved and what is free; or one job with its parts and history.

    Example: permed status -w 01k9
    """
    session = Session.of(ctx)

    def look() -> dict[str, Any]:
        with session.client() as client:  # anew each time: a home without a controller stays free for one
            return _overview(client) if job is None else _one(client, client.service.job(job))

    def show(console: Any, value: dict[str, Any]) -> None:
        if job is None:
            _show_overview(console, value)
        else:
            _show_one(console, value, every_part)

    if watch:
        live.watch(session, look, show, lambda value: job is not None and JobState(value["state"]) in _OVER)
    else:
        value = look()
        session.answer(value, lambda console: show(console, value))


def _overview(client: Client) -> dict[str, Any]:
    standing = client.service.top()
    states = Counter(row["state"] for row in standing.live)
    states["QUEUED"] = sum(count for row in standing.accounts for count in row["waiting"].values())
    states["HELD"] = len(client.service.jobs(states={JobState.HELD}))
    site = {"site": _site(client)} if client.delegated else {}
    return {
        "home": str(client.home.root), "executor": client.settings.executor, **site,
        "controller": "none" if client.embedded else "running",
        "nodes": standing.nodes, "states": {state: count for state, count in states.items() if count},
        "live": live.with_use(client.home, standing.live, _now()),
    }  # fmt: skip


def _site(client: Client) -> dict[str, Any]:
    """What the site's own scheduler has of this home: whoever looks asks it, whether a controller runs or not."""
    from permed_compute.errors import EngineError
    from permed_compute.execution.slurm import SlurmExecutor
    from permed_compute.execution.slurmjobs import in_words

    executor = SlurmExecutor(client.settings, client.home)
    told: dict[str, Any] = {"name": executor.site.name, "says": "", "allocations": []}
    try:
        found = executor.allocations()
    except EngineError as error:
        return told | {"says": error.message}
    for job_id, job in found:
        why = in_words(job.reason)[0] if job.state == "PENDING" else ""
        told["allocations"].append({
            "job": job_id, "name": client.service.job(job_id).spec.name, "number": job.number, "state": job.state,
            "partition": job.partition, "reason": job.reason, "why": why, "starts": job.starts,
        })  # fmt: skip
    return told


def _now() -> int:
    return int(time.time() * 1000)


def _show_overview(console: Any, value: dict[str, Any]) -> None:
    serves = "a controller serves this home" if value["controller"] == "running" else (
        "none runs; `permed run` brings its own, `permed controller` stays"
    )  # fmt: skip
    console.print(words.facts([("home", value["home"]), ("controller", serves), ("executor", value["executor"])]))
    if "site" in value:
        _show_site(console, value["site"])
    else:
        _show_nodes(console, value["nodes"])
    live.show(console, value["live"], _now())
    console.print(words.counts(value["states"]) or "nothing waits or runs")


def _show_site(console: Any, site: dict[str, Any]) -> None:
    """The allocations; how large the site is, is the site's affair."""
    states = Counter(row["state"] for row in site["allocations"])
    console.print(words.facts([("site", site["name"]), ("allocations", words.counts(states) or "none"),
                               ("Slurm", site["says"])]))  # fmt: skip
    if site["allocations"]:
        table = words.table("SLURM JOB", "PARTITION", "STATE", "JOB", "NAME", "STARTS", "WHY")
        for row in site["allocations"][:_PARTS_SHOWN]:
            starts = words.moment(row["starts"]) if row["starts"] and row["state"] == "PENDING" else ""
            table.add_row(row["number"], row["partition"], row["state"], row["job"], row["name"], starts, row["why"])
        console.print(table)
    if len(site["allocations"]) > _PARTS_SHOWN:
        console.print(f"… and {len(site['allocations']) - _PARTS_SHOWN} more: --json has them all")


def _show_nodes(console: Any, nodes: list[dict[str, Any]]) -> None:
    table = words.table("NODE", "CPU", "MEMORY", "GPU")
    for node in nodes:
        gpus = ", ".join(f"{gpu['flavor']} {gpu['reserved']:g}/1" for gpu in node["gpus"]) or "none"
        memory = f"{words.size(node['memory_reserved_mib'] * 2**20)} of {words.size(node['memory_mib'] * 2**20)}"
        table.add_row(node["node"], f"{node['cpus_reserved']:g} of {node['cpus']:g}", memory, gpus)
    console.print(table)


def _one(client: Client, job: Job) -> dict[str, Any]:
    from permed_compute.cli.follow import Follower

    follower = Follower(client.paths(job))
    follower.look(job)
    result = read_json(client.paths(job).results / "result.json") if job.state in ENDED else None
    parts = result["parts"] if result else list(follower.parts.values())
    said = client.service.why(job.id)
    events = client.service.events(job_id=job.id)
    standing = client.service.top().live if job.state in LIVE else []
    running = live.with_use(client.home, [row for row in standing if row["job"] == job.id], _now())
    return words.job_row(job) | {
        "live": running[0] if running else None,
        "why": said.as_dict(),
        "parts": [{name: part[name] for name in ("name", "state", "seconds", "reason", "slot") if name in part}
                  for part in parts],
        "parts_planned": follower.total, "stage": follower.sentence(job), "results": str(client.paths(job).results),
        "history": [{"at": e.at, "action": e.action, "before": e.before, "after": e.after, "reason": e.reason,
                     "actor": e.actor} for e in events],
    }  # fmt: skip


def _show_one(console: Any, value: dict[str, Any], every_part: bool) -> None:
    from rich.markup import escape

    spec, need = value["spec"], value["spec"]["resources"]
    grants = value["detail"].get("grants", [])
    console.print(words.facts([
        ("job", f"{value['id']}  {spec['name']}"), ("state", f"{value['state']} ({value['reason']})"),
        ("why", value["why"]["sentence"]), ("to change it", value["why"]["change"]),
        ("workload", spec["workload"]), ("account", f"{spec['account']}, {spec['band']}, {spec['purpose']}"),
        ("owner", value["owner"]), ("attempt", value["attempt"] or ""), ("stage", value["stage"]),
        ("asks for", f"{need['workers']['min']}..{need['workers']['max']} workers of {need['cpus']:g} CPU,"
                     f" {need['memory']}, {need['gpus']:g} GPU; {spec['time_limit']}"),
        ("holds", ", ".join(f"{g['cpu_milli'] / 1000:g} CPU on {g['node']} ({g['flavor']})" for g in grants)),
        ("results", value["results"]),
    ]))  # fmt: skip
    live.show(console, [value["live"]] if value["live"] else [], _now())
    parts = value["parts"] if every_part else value["parts"][:_PARTS_SHOWN]
    if parts:
        table = words.table("PART", "STATE", "SECONDS", "REASON")
        for part in parts:
            table.add_row(part["name"], part["state"], f"{part.get('seconds', 0):.1f}", escape(part.get("reason", "")))
        console.print(table)
        if len(value["parts"]) > len(parts):
            console.print(f"… and {len(value['parts']) - len(parts)} more: --parts")
    history = words.table("WHEN", "STATE", "REASON", "BY")
    for event in value["history"]:
        history.add_row(words.moment(event["at"]), event["after"] or event["action"], event["reason"], event["actor"])
    console.print(history)
