"""The display of `permed run`: one line per job while it waits and runs."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from permed_compute.cli import words
from permed_compute.cli.follow import Follower
from permed_compute.errors import PermedError
from permed_compute.states import JobState

if TYPE_CHECKING:
    from permed_compute.cli.session import Session
    from permed_compute.client import Client
    from permed_compute.queue.port import Job

_LINES = 8
_LOOK_S = 0.2
_WHY_S = 2.0


class Display:
    """`look(jobs)` is what `Client.wait` calls. Bars on a terminal, a line per change elsewhere, nothing for JSON."""

    def __init__(self, session: Session, client: Client) -> None:
        self.session = session
        self.client = client
        self.followers: dict[str, Follower] = {}
        self._said: dict[str, str] = {}
        self._why: dict[str, tuple[float, str]] = {}
        self._tasks: dict[str, Any] = {}
        self._looked = 0.0
        self._bars: Any = None

    def __enter__(self) -> Display:
        if not self.session.as_json and self.session.err.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[parts]:>7}"),
                TimeElapsedColumn(), TextColumn("[dim]{task.fields[said]}[/]"), console=self.session.err,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def look(self, jobs: list[Job]) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S and not all(job.state.value in self._said.get(job.id, "") for job in jobs):
            return
        self._looked = now
        for job in jobs[:_LINES]:
            follower = self.followers.setdefault(job.id, Follower(self.client.paths(job)))
            follower.look(job)
            said = self._reason(job, now) if job.state is JobState.QUEUED else follower.sentence(job)
            if self._bars is not None:
                self._bar(job, follower, said)
            elif not self.session.as_json:
                self._line(job, follower, said)

    def _reason(self, job: Job, now: float) -> str:
        at, sentence = self._why.get(job.id, (-_WHY_S, ""))
        if now - at >= _WHY_S:
            with suppress(PermedError):  # the job moved meanwhile; the next look sees where it is
                sentence = self.client.service.why(job.id).sentence
            self._why[job.id] = now, sentence
        return sentence

    def _bar(self, job: Job, follower: Follower, said: str) -> None:
        from rich.markup import escape

        if job.id not in self._tasks:
            self._tasks[job.id] = self._bars.add_task("", total=None, parts="", said="")
        parts = f"{follower.ended}/{follower.total}" if follower.total else ""
        self._bars.update(
            self._tasks[job.id], description=f"{words.state(job)} {escape(job.spec.name)}",
            total=follower.total or None, completed=follower.ended, parts=parts, said=escape(said),
        )  # fmt: skip

    def _line(self, job: Job, follower: Follower, said: str) -> None:
        from rich.markup import escape

        line = f"{job.id}  {job.state.value}  {said}".rstrip()
        if follower.total and job.state is JobState.RUNNING:
            tenth = 10 * follower.ended // follower.total
            line += f"  {follower.ended}/{follower.total} parts" if tenth in (0, 10) else f"  {tenth}0 % of the parts"
        if self._said.get(job.id) != line:
            self._said[job.id] = line
            self.session.err.print(escape(line))
