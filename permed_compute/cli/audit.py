"""`permed audit`: is the log what was written?"""

from __future__ import annotations

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from permed_compute.cli.session import Session
from permed_compute.errors import QueueError

app = typer.Typer(
    no_args_is_help=True, help="The hash-chained log of every change: verify it, or accept a restored one."
)


@app.command("verify")
def verify(ctx: typer.Context) -> None:
    """Recompute the whole chain and compare it with the anchor; names the first record that is wrong. Exit 1 if any.

    Example: permed audit verify
    """
    from permed_compute.queue import events

    session = Session.of(ctx)
    with session.client() as client:
        anchor = events.Anchor.of(Path(client.settings.anchor), client.home.root)
        verified = events.verify(client.queue or client.service, anchor)  # type: ignore[arg-type]
    session.answer(
        asdict(verified),
        f"[green]✓[/] {verified.count} events, an unbroken chain; head {verified.head[:16]}…,"
        f" anchored up to event {verified.anchored_seq}",
    )


@app.command("accept")
def accept(
    ctx: typer.Context,
    why: Annotated[str, typer.Option("--why", help="Who restored what, and why: it goes into the log.")],
) -> None:
    """Take the log as it is now, after a restore that somebody answers for; written into the log itself.

    Example: permed audit accept --why "restored Monday's backup after a disk failure"
    """
    from permed_compute.queue import events

    session = Session.of(ctx)
    with session.client() as client:
        if client.queue is None:
            raise QueueError("A controller leads this home.", remedy="Stop it first.")
        anchor = events.Anchor.of(Path(client.settings.anchor), client.home.root)
        mark = anchor.accept(client.queue, actor=getpass.getuser(), why=why)
    session.answer(asdict(mark), f"accepted: the log as of event {mark.seq}")
