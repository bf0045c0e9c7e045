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
from permed_compute.states import ENDED, JobState

if TYPE_CHECKING:
    from permed_compute.client import Client
    from permed_compute.transfer.receipts import Receipt

_HALF_WRITTEN_S = 86_400
"""A part that is being written for longer than this has been abandoned: parts take seconds to minutes."""


def add_to(app: typer.Typer) -> None:
    app.command("gc")(gc)


@dataclass(frozen=True, slots=True)
class Doomed:
    """A folder that goes."""

    path: Path
    what: str
    papers: tuple[Path, ...] = ()
    """What says that it is there, which goes before it."""


def gc(
    ctx: typer.Context,
    older_than: Annotated[str, typer.Option("--older-than", help="Jobs that ended longer ago than this.")] = "30d",
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Also finished parts that old: the next job computes them again.")
    ] = False,
    received: Annotated[
        str,
        typer.Option(
            "--received",
            metavar="AGE",
            help="Also sets received into this home longer ago than this, but for those of jobs that have not ended.",
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove attempts and results of jobs that ended long ago, and what crashes left half-written.

    The queue and its log keep every job; sets of files that were received stay unless they are named.

    Example: permed gc --older-than 90d --received 1d --dry-run
    """  # fmt: skip
    session = Session.of(ctx)
    age = words.duration(older_than)
    with session.client() as client:
        doomed = list(_doomed(client, age, ledger))
        sets = list(_sets(client.home))
        if received:
            doomed += _unused(client, sets, words.duration(received))
        freed = sum(_bytes(item.path) for item in doomed)
        total = sum(receipt.bytes for receipt in sets)
        if not dry_run:
            for item in doomed:
                for paper in item.papers:
                    paper.unlink(missing_ok=True)
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
        if sets and not received:
            count = f"{len(sets)} received set{'s' if len(sets) > 1 else ''}"
            console.print(f"{count} of {words.size(total)} kept; `permed gc --received 90d` removes older ones")

    session.answer(
        {"dry_run": dry_run, "bytes": freed, "removed": [{"path": str(d.path), "what": d.what} for d in doomed],
         "received": {"sets": len(sets), "bytes": total}},
        show,
    )  # fmt: skip


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


def _sets(home: HomePaths) -> Iterator[Receipt]:
    """The sets that stand in the home itself: what `receive --to` put elsewhere is its user's."""
    from permed_compute.transfer import receipts

    inside = home.received.resolve()
    return (each for each in receipts.every(home.transfers) if Path(each.folder).resolve().is_relative_to(inside))


def _unused(client: Client, sets: list[Receipt], age: int) -> Iterator[Doomed]:
    """Sets that came longer ago than that and that no job which has not ended needs."""
    from permed_compute.transfer import receipts

    before = time.time() - age
    specs = [job.spec for job in client.service.jobs(states=set(JobState) - ENDED)]
    named = {reference for spec in specs for _, reference in receipts.references(spec, client.home.transfers)}
    paths = [Path(text) for spec in specs for text in (*(ref.path for ref in spec.inputs), spec.code)]
    for each in sets:
        paper, folder = receipts.file(client.home.transfers, each.reference), Path(each.folder)
        needed = each.reference in named or any(path.is_relative_to(folder) for path in paths)
        if paper.stat().st_mtime < before and not needed:
            yield Doomed(folder, "received sets", (paper,))


def half_written(home: HomePaths) -> Iterator[Doomed]:
    """Parts that a crash left half-written."""
    for folder in home.ledger.glob("*/.new/*"):
        if time.time() - folder.stat().st_mtime > _HALF_WRITTEN_S:
            yield Doomed(folder, "half-written parts")


def _bytes(folder: Path) -> int:
    # A file that is linked elsewhere too (results show the ledger's files) is not freed by removing one name.
    files = (path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(stat.st_size for stat in files if stat.st_nlink == 1)
