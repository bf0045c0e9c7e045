"""`permed backup` and `permed restore`: a consistent copy of the queue and of what its log names, and back."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from permed_compute.cli.session import Session
from permed_compute.errors import QueueError
from permed_compute.paths import HomePaths


def add_to(app: typer.Typer) -> None:
    app.command("backup")(backup)
    app.command("restore")(restore)


def backup(
    ctx: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File to write; it appears whole or not at all.")],
) -> None:
    """Copy the queue (jobs and their log) to a file while jobs run, with the evidence and cards of validated models.

    Results are files: copy them as files.

    Example: permed backup queue-2026-11-21.backup
    """
    from rich.markup import escape

    session = Session.of(ctx)
    if target.exists():
        raise QueueError(f"{target} is there already.", remedy="Name a new file: a backup never replaces another.")
    with session.client() as client:
        if client.queue is not None:
            said = client.queue.backup(str(target.absolute()), client.home.models)
        else:
            # A controller leads; its store is copied from the side, which both databases do consistently.
            from permed_compute.queue.sql import SqlQueue

            url = client.settings.queue_url or f"sqlite:///{client.home.database}"
            queue = SqlQueue(url)
            try:
                said = queue.backup(str(target.absolute()), client.home.models)
            finally:
                queue.close()
    session.answer({"backup": said, "path": str(target.absolute())}, escape(said))


def restore(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file that `permed backup` wrote.")],
) -> None:
    """Fill this home's empty queue from a backup. Then `permed audit accept` says in the log who answers for it.

    Example: permed --home new-home restore queue-2026-11-21.backup
    """
    from rich.markup import escape

    from permed_compute.queue import backup as backups

    session = Session.of(ctx)
    settings = session.settings
    home = settings.paths.create()
    with _nobody_leads(home):
        said = backups.restore(str(source), settings.queue_url or f"sqlite:///{home.database}", home.models)
    session.answer({"restored": said}, f"restored: {escape(said)}")
    session.note("What ran at the time of the backup is looked for at the next start, and run again where it is gone.")


@contextmanager
def _nobody_leads(home: HomePaths) -> Iterator[None]:
    """Hold the home's lock for the while. Raises `QueueError` while a controller runs."""
    handle = os.open(home.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QueueError("A controller leads this home.", remedy="Stop it first.") from None
        yield
    finally:
        os.close(handle)
