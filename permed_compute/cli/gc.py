"""`permed gc`: remove what old jobs left. The ledger of finished parts is kept unless it is asked for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session
from permed_compute.paths import HomePaths, read_json
from permed_compute.states import ENDED

if TYPE_CHECKING:
    from permed_compute.client import Client

_HALF_WRITTEN_S = 86_400
"""A part that is being written for longer than this has been abandoned: parts take seconds to minutes."""


def add_to(app: typer.Typer) -> None:
    app.command("gc")(gc)


@dataclass(frozen=True, slots=True)
class Doomed:
    """A folder that goes."""

    path: Path
    what: str


def gc(
    ctx: typer.Context,
    older_than: Annotated[str, typer.Option("--older-than", help="Jobs that ended longer ago than this.")] = "30d",
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Also finished parts that old: the next job computes them again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove attempts and results of jobs that ended long ago, and what crashes left half-written.

    The queue and its log keep every job. Example: permed gc --older-than 90d --dry-run
    """
    session = Session.of(ctx)
    age = words.duration(older_than)
    with session.client() as client:
        doomed = list(_doomed(client, age, ledger))
        freed = sum(_bytes(item.path) for item in doomed)
        if not dry_run:
            for item in doomed:
                shutil.rmtree(item.path, ignore_errors=True)
            if doomed and client.queue is not None:
                counts = {what: sum(d.what == what for d in doomed) for what in {d.what for d in doomed}}
                client.queue.note("removed-by-gc", actor="permed gc", data=counts | {"bytes": freed})

    def show(console: Any) -> None:
        kinds = {item.what for item in doomed}
        for kind in sorted(kinds):
            console.print(f"{sum(item.what == kind for item in doomed):6d}  {kind}")
        verb = "would be freed" if dry_run else "freed"
        console.print(f"{words.size(freed)} {verb}" if doomed else "nothing to remove")

    session.answer(
        {"dry_run": dry_run, "bytes": freed, "removed": [{"path": str(d.path), "what": d.what} for d in doomed]}, show
    )


def _doomed(client: Client, age: int, ledger: bool) -> Iterator[Doomed]:
    before = time.time() - age
    for job in client.service.jobs(states=ENDED):
        folder = client.home.job(job.id).root
        if job.changed_at < before * 1000 and folder.is_dir():
            yield Doomed(folder, "jobs' results, attempts and checkpoints")
    yield from half_written(client.home)
    if ledger:
        for record in client.home.ledger.glob("*/[0-9a-f][0-9a-f]/*/part.json"):
            row = read_json(record) or {}
            if int(row.get("at", 0)) < before * 1000:
                yield Doomed(record.parent, "finished parts")


def half_written(home: HomePaths) -> Iterator[Doomed]:
    """Parts that a crash left half-written."""
    for folder in home.ledger.glob("*/.new/*"):
        if time.time() - folder.stat().st_mtime > _HALF_WRITTEN_S:
            yield Doomed(folder, "half-written parts")


def _bytes(folder: Path) -> int:
    # A file that is linked elsewhere too (results show the ledger's files) is not freed by removing one name.
    files = (path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(stat.st_size for stat in files if stat.st_nlink == 1)
