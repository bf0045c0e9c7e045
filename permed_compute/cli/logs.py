"""`permed logs`: what a job's newest attempt said."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from permed_compute.cli.jobs import JobArgument
from permed_compute.cli.session import Session
from permed_compute.states import ENDED, JobState

if TYPE_CHECKING:
    from permed_compute.paths import AttemptPaths
    from permed_compute.queue.port import Job

_LOOK_S = 0.3


def add_to(app: typer.Typer) -> None:
    app.command("logs")(logs)


def logs(
    ctx: typer.Context,
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    attempt: Annotated[int, typer.Option(help="An earlier attempt's; default the newest.")] = 0,
) -> None:
    """Show what the newest attempt of a job said; never an identifier of a patient.

    Example: permed logs -f 01k9
    """
    session = Session.of(ctx)
    # The connection is not kept: following a log must not keep others from leading this home.
    found = _look_up(session, job)
    reader = _Reader()
    lines: list[str] = []
    while True:
        ended = found.state in ENDED or found.state is JobState.HELD
        number = attempt or found.attempt
        if number:
            for line in reader.new(session.settings.paths.job(found.id).attempt(number)):
                if session.as_json and not follow:
                    lines.append(line)
                else:
                    sys.stdout.write(line + "\n")
            sys.stdout.flush()
        if not follow or ended:
            break
        time.sleep(_LOOK_S)
        found = _look_up(session, found.id)
    if session.as_json and not follow:
        session.answer({"job": found.id, "attempt": attempt or found.attempt, "lines": lines})
    elif not reader.lines:
        session.note("It has said nothing." if found.attempt else "It has not started yet: permed why " + found.id)


def _look_up(session: Session, job: str) -> Job:
    with session.client() as client:
        return client.service.job(job)


class _Reader:
    """Whole lines of an attempt's log and of its records of kind `log`, each once."""

    def __init__(self) -> None:
        self.lines = 0
        self._root: object = None
        self._log = 0
        self._offsets: dict[str, int] = {}

    def new(self, paths: AttemptPaths) -> Iterator[str]:
        if paths.root != self._root:
            self._root, self._log, self._offsets = paths.root, 0, {}
        for line in self._both(paths):
            self.lines += 1
            yield line

    def _both(self, paths: AttemptPaths) -> Iterator[str]:
        from permed_compute.execution import records

        if paths.log.exists():
            with paths.log.open("rb") as file:
                file.seek(self._log)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._log += len(whole)
            yield from whole.decode(errors="replace").splitlines()
        for path in sorted(paths.root.glob("records-*.jsonl")):
            rows, self._offsets[path.name] = records.read(path, self._offsets.get(path.name, 0))
            for row in rows:
                if row.get("kind") == "log":
                    yield from str(row.get("text", "")).splitlines()
