"""`permed frequency`: what a register of allele frequencies has released, and whether it still stands as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli.session import Session
from permed_compute.errors import NotFoundError

app = typer.Typer(
    no_args_is_help=True, help="A register of allele frequencies: its releases, and whether they are as released."
)
_Register = Annotated[Path, typer.Argument(help="The register's folder, as in the job file.", metavar="REGISTER")]


@app.command("show")
def show(ctx: typer.Context, register: _Register) -> None:
    """Releases of a register: when, under which policy, of how many people, how much was withheld.

    Example: permed frequency show REGISTER
    """
    entries = _open(register).entries()
    lines = [
        f"{entry['release']:4d}  {entry['made_at']}  {entry['policy']['name']:10s}"
        f"  {sum(entry['people'].values())} people, {entry['variants']} variants, {entry['withheld']} cells withheld"
        for entry in entries
    ]
    Session.of(ctx).answer(entries, "\n".join(lines) or "No release yet.")


@app.command("verify")
def verify(ctx: typer.Context, register: _Register) -> None:
    """Recompute the chain of audit entries and compare every table with its entry. Exit 1 at the first that is wrong.

    Example: permed frequency verify REGISTER
    """
    count = _open(register).verify()
    Session.of(ctx).answer({"releases": count}, f"[green]✓[/] {count} releases, as they were released")


def _open(folder: Path) -> Any:
    from permed_compute.storage.register import Register

    if not (folder / "releases").is_dir():
        raise NotFoundError("There is no register in that folder.", remedy="omics/frequency makes one.")
    return Register(folder)
