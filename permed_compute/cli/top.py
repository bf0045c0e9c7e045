"""`permed top`: the pool at a glance: who uses what, who waits for what, which starts are reserved."""

from __future__ import annotations

from typing import Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session


def add_to(app: typer.Typer) -> None:
    app.command("top")(top)


def top(ctx: typer.Context) -> None:
    """Show the pool: use by flavor and account, what waits and why, reserved starts.

    Example: permed top
    """
    from permed_compute.admission.quotafile import shown

    session = Session.of(ctx)
    with session.client() as client:
        standing = client.service.top()

    def show(console: Any) -> None:
        pool = words.table("FLAVOR", "USED", "THERE")
        for row in standing.flavors:
            pool.add_row(row["flavor"], *(shown(row["flavor"], row[n]).rsplit(" ", 1)[0] for n in ("used", "there")))
        console.print(pool)
        table = words.table("ACCOUNT", "LIVE", "WAITING", "WHY")
        for row in standing.accounts:
            waiting = row["waiting"]
            if row["live"] or waiting:
                why = ", ".join(f"{count} {code}" for code, count in sorted(waiting.items(), key=lambda w: -w[1]))
                table.add_row(row["account"], str(row["live"]), str(sum(waiting.values())), why)
        console.print(table if table.row_count else "Nothing waits or runs.")
        for start in standing.starts:
            console.print(f"{start['job']} starts by {words.moment(start['at'])}", markup=False)
        for what in ("drained", "frozen"):
            if getattr(standing, what):
                console.print(f"{what}: {', '.join(getattr(standing, what))}", markup=False)

    session.answer(standing.as_dict(), show)
