"""`permed controller`: serve this home's queue until told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli.session import Session
from permed_compute.states import ENDED, JobState

if TYPE_CHECKING:
    from permed_compute.client import Client

_LOG_BYTES = 10_000_000
_LOG_FILES = 5


def add_to(app: typer.Typer) -> None:
    app.command("controller")(controller)


def controller(
    ctx: typer.Context,
    once_idle: Annotated[
        bool, typer.Option("--once-idle", help="Stop as soon as nothing waits, runs, or is to be sent to tracking.")
    ] = False,
) -> None:
    """Serve this home: decide, launch, watch, until SIGTERM or Ctrl-C. What runs on Ray goes on and is adopted again.

    Example: permed controller
    """
    session = Session.of(ctx)
    _log_to(session)
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        logging.getLogger("permed_compute").info("stopping: %s", signal.Signals(number).name)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with session.client() as client:
            session.note(f"serving {client.home.root}; log: {client.home.log}; Ctrl-C stops")
            client.serve(lambda: stop.is_set() or (once_idle and _idle(client)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    session.note("stopped; the lease is given back")


def _idle(client: Client) -> bool:
    if client.service.jobs(states=set(JobState) - ENDED - {JobState.HELD}, limit=1):
        return False
    from permed_compute.tracking.files import Spool

    return client.settings.tracking_uri == "none" or not Spool(client.home.spool).pending()


def _log_to(session: Session) -> None:
    from logging.handlers import RotatingFileHandler

    home = session.settings.paths.create()
    handler = RotatingFileHandler(home.log, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    home.log.chmod(0o600)
    logger = logging.getLogger("permed_compute")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
