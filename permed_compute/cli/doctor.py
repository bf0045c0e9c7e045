"""`permed doctor`: what is here, what is wrong, and what can be mended."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session

_MARKS = {"ok": "[green]✓[/]", "note": "[dim]·[/]", "warn": "[yellow]![/]", "bad": "[red]✗[/]", "mended": "[cyan]✚[/]"}


def add_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    ctx: typer.Context,
    mend: Annotated[bool, typer.Option("--mend", help="Mend what can be mended; nothing that holds results.")] = False,
) -> None:
    """Show settings with their source, engines, GPUs, free space and what is wrong; mend what can be mended.

    Exit 1 where something is wrong. Example: permed doctor --mend
    """
    from permed_compute.cli import checks

    session = Session.of(ctx)
    settings = session.settings
    rows = [checks.mended(check) if mend else check for check in checks.all_checks(settings)]
    value = {
        "settings": [{"name": n, "value": v, "source": s, "help": h} for n, v, s, h in settings.rows()],
        "checks": [check.as_dict() for check in rows],
    }

    def show(console: Any) -> None:
        from rich.markup import escape

        table = words.table("SETTING", "VALUE", "FROM")
        for row in value["settings"]:
            table.add_row(row["name"], escape(str(row["value"])) or "[dim]–[/]", row["source"])
        console.print(table)
        for check in rows:
            console.print(f"{_MARKS[check.level]} {check.name}: {escape(check.sentence)}")
            if check.remedy and check.level in ("warn", "bad"):
                console.print(f"    [green]→[/] {escape(check.remedy)}")
        if any(check.mend for check in rows if check.level in ("warn", "bad")):
            console.print("[green]→[/] permed doctor --mend")

    session.answer(value, show)
    if any(check.level == "bad" for check in rows):
        raise typer.Exit(Exit.FAILED)
