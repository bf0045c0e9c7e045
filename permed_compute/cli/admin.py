"""What operators rule: drain, freeze, reserve, preempt; and the proof that decisions can be taken again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session

if TYPE_CHECKING:
    from permed_compute.client import Client
    from permed_compute.queue.port import Event
    from permed_compute.spec import JobSpec

NodesArgument = Annotated[list[str], typer.Argument(metavar="NODE...", help="Names of nodes; `*` is all of the site.")]
AccountArgument = Annotated[str, typer.Argument(metavar="ACCOUNT", help="With all accounts below it.")]


def add_to(app: typer.Typer) -> None:
    for command in (drain, undrain, freeze, thaw, reserve, unreserve, preempt):
        app.command(command.__name__)(command)
    app.command("replay-decisions")(replay_decisions)


def drain(ctx: typer.Context, nodes: NodesArgument) -> None:
    """Start nothing new on these nodes; what runs there goes on.

    Example: permed drain gpu-07
    """
    _rule(ctx, "drain", {"nodes": nodes}, f"drained: {', '.join(nodes)}")


def undrain(ctx: typer.Context, nodes: NodesArgument) -> None:
    """Use drained nodes again.

    Example: permed undrain gpu-07
    """
    _rule(ctx, "undrain", {"nodes": nodes}, f"in use again: {', '.join(nodes)}")


def freeze(ctx: typer.Context, account: AccountArgument) -> None:
    """Start nothing new of an account; what runs goes on.

    Example: permed freeze helse/nord
    """
    _rule(ctx, "freeze", {"account": account}, f"frozen: {account}")


def thaw(ctx: typer.Context, account: AccountArgument) -> None:
    """Let a frozen account start jobs again.

    Example: permed thaw helse/nord
    """
    _rule(ctx, "thaw", {"account": account}, f"no longer frozen: {account}")


def reserve(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A name for the window, e.g. kernel-update.")],
    nodes: NodesArgument,
    start: Annotated[str, typer.Option("--from", help="ISO 8601 with a time zone.")],
    end: Annotated[str, typer.Option("--until", help="ISO 8601 with a time zone.")],
    accounts: Annotated[list[str] | None, typer.Option("--for", help="Only for these; none: maintenance.")] = None,
) -> None:
    """Keep nodes free for a while: for maintenance, or for some accounts alone.

    Example: permed reserve kernel gpu-07 --from 2026-12-01T06:00+01:00 --until 2026-12-01T10:00+01:00
    """
    begins, ends = _moment(start), _moment(end)
    if ends <= begins:
        raise typer.BadParameter(f"{end} is not after {start}.")
    window = {"name": name, "nodes": nodes, "start": begins, "end": ends, "accounts": list(accounts or ())}
    _rule(ctx, "reserve", {"window": window}, f"reserved: {name} on {', '.join(nodes)}")


def unreserve(ctx: typer.Context, name: Annotated[str, typer.Argument(help="The window's name.")]) -> None:
    """Give up a reserved window.

    Example: permed unreserve kernel
    """
    _rule(ctx, "unreserve", {"name": name}, f"no longer reserved: {name}")


def preempt(ctx: typer.Context, job: Annotated[str, typer.Argument(metavar="JOB", help="Job id.")]) -> None:
    """Stop a running job with its checkpoint and queue it again.

    Example: permed preempt 01k9
    """
    session = Session.of(ctx)
    with session.client() as client:
        moved = client.service.preempt(client.service.job(job).id)
    session.answer(words.job_row(moved), lambda console: words.job_lines(console, [moved]))


def replay_decisions(ctx: typer.Context) -> None:
    """Take every decision of the log again and compare: the same state must lead to the same plan. Exit 1 if not.

    Example: permed replay-decisions
    """
    from dataclasses import asdict

    from permed_compute.admission.commit import stopping_instead
    from permed_compute.admission.replay import replay

    session = Session.of(ctx)
    with session.client() as client:
        specs = _specs(client)
        done = replay(_events(client), specs.__getitem__, stopping_instead)
    numbers = ", ".join(map(str, done.different))
    verdict = f"[red]✗[/] different: events {numbers}" if numbers else "[green]✓[/] all the same"
    session.answer(asdict(done), f"{done.moves} moves of {done.decisions} decisions taken again: {verdict}")
    if done.different:
        raise typer.Exit(Exit.FAILED)


def _specs(client: Client) -> dict[str, JobSpec]:
    return {job.id: job.spec for job in client.service.jobs()}


def _events(client: Client) -> list[Event]:
    found: list[Event] = []
    while events := client.service.events(after=found[-1].seq if found else 0, limit=5000):
        found += events
    return found


def _rule(ctx: typer.Context, reason: str, data: dict[str, Any], said: str) -> None:
    session = Session.of(ctx)
    with session.client() as client:
        event = client.service.admin(reason, data)
    session.answer({"seq": event.seq, "reason": reason, **data}, lambda console: console.print(said, markup=False))


def _moment(text: str) -> int:
    from datetime import datetime

    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a moment; write e.g. 2026-12-01T06:00+01:00.") from None
    if at.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no time zone; write e.g. {text}+01:00.")
    return int(at.timestamp() * 1000)
