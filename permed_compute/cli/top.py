"""`permed top`: the pool at a glance: who uses what, who waits for what, what runs how fast, what starts when."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from permed_compute.cli import live, words
from permed_compute.cli.session import Session


def add_to(app: typer.Typer) -> None:
    app.command("top")(top)


def top(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again every 2 s, until Ctrl-C.")] = False,
) -> None:
    """Show the pool: use by flavor and account, what waits and why, reserved starts; and what each job really uses, how
    fast it goes and when it will be done.

    Example: permed top -w
    """
    session = Session.of(ctx)

    def look() -> dict[str, Any]:
        with session.client() as client:  # anew each time: a home without a controller stays free for one
            standing = client.service.top().as_dict()
            return standing | {"live": live.with_use(client.home, standing["live"], int(time.time() * 1000))}

    if watch:
        live.watch(session, look, _show)
    else:
        value = look()
        session.answer(value, lambda console: _show(console, value))


def _show(console: Any, value: dict[str, Any]) -> None:
    from permed_compute.admission.quotafile import shown

    pool = words.table("FLAVOR", "USED", "THERE")
    for row in value["flavors"]:
        pool.add_row(row["flavor"], *(shown(row["flavor"], row[n]).rsplit(" ", 1)[0] for n in ("used", "there")))
    console.print(pool)
    table = words.table("ACCOUNT", "LIVE", "WAITING", "WHY")
    for row in value["accounts"]:
        waiting = row["waiting"]
        if row["live"] or waiting:
            why = ", ".join(f"{count} {code}" for code, count in sorted(waiting.items(), key=lambda w: -w[1]))
            table.add_row(row["account"], str(row["live"]), str(sum(waiting.values())), why)
    console.print(table if table.row_count else "Nothing waits or runs.")
    live.show(console, value["live"], int(time.time() * 1000))
    for start in value["starts"]:
        console.print(f"{start['job']} starts by {words.moment(start['at'])}", markup=False)
    for what in ("drained", "frozen"):
        if value[what]:
            console.print(f"{what}: {', '.join(value[what])}", markup=False)
