"""`permed quota`: who may use how much: check a policy file, say what it changes, apply it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session

app = typer.Typer(no_args_is_help=True, help="Quotas: check a policy file, say what it changes for whom, apply it.")
PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file; see cluster/quota.yaml.")]


@app.command("check")
def check(ctx: typer.Context, file: PolicyFile) -> None:
    """Validate a policy file: every problem with its line and what to write instead.

    Example: permed quota check quota.yaml
    """
    from permed_compute.admission import quotafile

    policy = quotafile.load(file)
    quotas: dict[str, int] = {}
    for account in policy.accounts:
        for flavor, quota in account.quotas.items():
            quotas[flavor] = quotas.get(flavor, 0) + quota.nominal
    told = ", ".join(
        f"{quotafile.shown(f, n)} of {quotafile.shown(f, policy.capacity[f])}" for f, n in quotas.items()
    )  # fmt: skip
    Session.of(ctx).answer(
        {"policy": policy.version, "accounts": len(policy.accounts), "quotas": quotas},
        f"[green]✓[/] policy {policy.version}: {len(policy.accounts)} accounts divide {told}",
    )


@app.command("diff")
def diff(
    ctx: typer.Context,
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The policy file as it was.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The policy file as it is to be.")],
) -> None:
    """Say in words what changes between two policy files, and for whom.

    Example: permed quota diff old.yaml new.yaml
    """
    from permed_compute.admission import quotafile

    said = quotafile.diff(quotafile.load(old), quotafile.load(new))
    Session.of(ctx).answer(said, lambda console: _lines(console, said or ["Nothing changes."]))


@app.command("apply")
def apply(ctx: typer.Context, file: PolicyFile) -> None:
    """Put a policy in force: it goes into the log, and decisions follow it from the next one on.

    Example: permed quota apply quota.yaml
    """
    from permed_compute.admission import quotafile

    session = Session.of(ctx)
    policy = quotafile.load(file)
    with session.client() as client:
        event = client.service.admin("policy", {"policy": policy.row()})
    session.answer({"policy": policy.version, "seq": event.seq}, f"policy {policy.version}: event {event.seq}")


def _lines(console: Any, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False)


@app.command("show")
def show(ctx: typer.Context) -> None:
    """List the accounts with what they use, have and may still take.

    Example: permed quota show
    """
    from permed_compute.admission.quotafile import shown

    session = Session.of(ctx)
    with session.client() as client:
        standing = client.service.top()

    def table(console: Any) -> None:
        made = words.table("ACCOUNT", "FLAVOR", "USED", "QUOTA", "AVAILABLE")
        for row in standing.accounts:
            for flavor, figures in row["flavors"].items():
                made.add_row(row["account"], flavor, *(shown(flavor, figures[n]).split(" ")[0]
                                                       for n in ("used", "quota", "available")))  # fmt: skip
        console.print(made if made.row_count else "No policy is in force: everybody may use everything.")

    session.answer({"policy": standing.policy, "accounts": standing.accounts}, table)
