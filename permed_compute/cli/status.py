"""`permed status`: what the machine holds and for whom; or everything about one job."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session
from permed_compute.paths import read_json
from permed_compute.states import ENDED, LIVE, JobState

if TYPE_CHECKING:
    from permed_compute.client import Client
    from permed_compute.queue.port import Job

_PARTS_SHOWN = 30


def add_to(app: typer.Typer) -> None:
    app.command("status")(status)


def status(
    ctx: typer.Context,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Job id; without one, the overview.")] = None,
    every_part: Annotated[bool, typer.Option("--parts", help="Show every part, not only the first 30.")] = False,
) -> None:
    """Show what runs, what is reserved and what is free; or one job with its parts and history.

    Example: permed status 01k9
    """
    session = Session.of(ctx)
    with session.client() as client:
        if job is None:
            value = _overview(client)
            session.answer(value, lambda console: _show_overview(console, value))
        else:
            value = _one(client, client.service.job(job))
            session.answer(value, lambda console: _show_one(console, value, every_part))


def _overview(client: Client) -> dict[str, Any]:
    from permed_compute.admission.snapshot import grants_of
    from permed_compute.execution.device import local_node

    jobs = client.service.jobs(states=set(JobState) - ENDED)
    grants = [(job, grant) for job in jobs if job.state in LIVE for grant in grants_of(job)]
    nodes = []
    for node in (local_node(client.settings),):
        here = [grant for _, grant in grants if grant.node == node.name]
        shares = Counter({gpu.index: 0 for gpu in node.gpus})
        for grant in here:
            shares.update({index: min(1000, grant.gpu_milli) for index in grant.devices})
        nodes.append({
            "node": node.name, "cpus": node.cpu_milli / 1000, "cpus_reserved": sum(g.cpu_milli for g in here) / 1000,
            "memory_mib": node.memory, "memory_reserved_mib": sum(g.memory for g in here),
            "gpus": [{"index": gpu.index, "flavor": gpu.flavor, "memory_mib": gpu.memory,
                      "reserved": shares[gpu.index] / 1000} for gpu in node.gpus],
        })  # fmt: skip
    return {
        "home": str(client.home.root), "executor": client.settings.executor,
        "controller": "none" if client.embedded else "running",
        "nodes": nodes, "states": dict(Counter(job.state.value for job in jobs)),
        "live": [{"job": job.id, "name": job.spec.name, "state": job.state.value, "account": job.spec.account,
                  "started_at": job.started_at, "workers": len(grants_of(job)),
                  "cpus": sum(g.cpu_milli for g in grants_of(job)) / 1000} for job in jobs if job.state in LIVE],
    }  # fmt: skip


def _show_overview(console: Any, value: dict[str, Any]) -> None:
    serves = "a controller serves this home" if value["controller"] == "running" else (
        "none runs; `permed run` brings its own, `permed controller` stays"
    )  # fmt: skip
    console.print(words.facts([("home", value["home"]), ("controller", serves), ("executor", value["executor"])]))
    table = words.table("NODE", "CPU", "MEMORY", "GPU")
    for node in value["nodes"]:
        gpus = ", ".join(f"{gpu['flavor']} {gpu['reserved']:g}/1" for gpu in node["gpus"]) or "none"
        memory = f"{words.size(node['memory_reserved_mib'] * 2**20)} of {words.size(node['memory_mib'] * 2**20)}"
        table.add_row(node["node"], f"{node['cpus_reserved']:g} of {node['cpus']:g}", memory, gpus)
    console.print(table)
    if value["live"]:
        live = words.table("JOB", "NAME", "STATE", "WORKERS", "CPU", "RUNS SINCE")
        for row in value["live"]:
            live.add_row(row["job"], row["name"], row["state"], str(row["workers"]), f"{row['cpus']:g}",
                         words.ago(row["started_at"]))  # fmt: skip
        console.print(live)
    console.print(words.counts(value["states"]) or "nothing waits or runs")


def _one(client: Client, job: Job) -> dict[str, Any]:
    from permed_compute.cli.follow import Follower

    follower = Follower(client.paths(job))
    follower.look(job)
    result = read_json(client.paths(job).results / "result.json") if job.state in ENDED else None
    parts = result["parts"] if result else list(follower.parts.values())
    said = client.service.why(job.id)
    events = client.service.events(job_id=job.id)
    return words.job_row(job) | {
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
