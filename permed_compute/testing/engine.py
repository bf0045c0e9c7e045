"""An engine of pretended processes: attempts start, beat, publish parts, checkpoint, stop and die as they are told.

It keeps every promise of `execution.port.Executor`; what is pretended is the machines. Files are real: attempts write
their records and exit records, publish into the real ledger and heed the real fence. Time is what `clock` says, nothing
moves but by `advance`, and chance is given, so that the same seed lives the same lives. Calls go wrong as `faults`
says.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.admission.snapshot import Node
from permed_compute.errors import EngineError, StaleError
from permed_compute.execution.context import check_fence, fenced_off
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths, write_json
from permed_compute.queue.port import Clock
from permed_compute.storage.ledger import Ledger
from permed_compute.testing.faults import CALL, Faults
from permed_compute.testing.invariants import Life

ZOMBIE_MS = 40_000
"""So long processes go on at most on a node that was cut off: then it notices itself."""
_STEPS_PER_CHECKPOINT = 2


@dataclass(slots=True, eq=False)
class Body(Life):
    """An attempt that lives: its driver (on the first grant's node) and one member for each grant.

    A map (params: bag, parts) publishes parts under keys that jobs of one bag share; a gang (params: steps) trains.
    """

    attempt: Attempt = field(kw_only=True)
    due: int = field(kw_only=True)
    """When its next step is done, ms."""
    driver: bool = True
    exited: bool = False
    """Its exit record is written; the processes may still be there."""
    until: int = 0
    """When it ends by itself (cut off, or done), 0: not."""
    stop_at: int = 0
    records: Records | None = None
    began: Path | None = None
    """The folder of the part that is being computed."""

    @property
    def gang(self) -> bool:
        return "steps" in self.attempt.spec.params


class FakeEngine:
    """See the module, and `execution.port.Executor`. `head()` is the newest event's number, to date lives by."""

    name = "fake"

    def __init__(
        self, nodes: Iterable[Node], clock: Clock, chance: random.Random, faults: Faults, head: Callable[[], int]
    ) -> None:
        self.all_nodes = {node.name: node for node in nodes}
        self.up = set(self.all_nodes)
        self.silent = False
        """Its head does not answer; what runs goes on."""
        self.lives: list[Body] = []
        self.first_publications: list[str] = []
        self.writes: list[tuple[str, int, int]] = []
        """(job, attempt, newest event) of each part, checkpoint and result that was published."""
        self.results: set[str] = set()
        """Jobs whose results were published."""
        self.refused = 0
        """How often the fence kept somebody from writing."""
        self.trained: dict[str, int] = {}
        self._clock, self._chance, self._faults, self._head = clock, chance, faults, head
        self._known: tuple[Node, ...] = ()
        self._running: dict[str, Body] = {}
        self._under_way: dict[str, tuple[int, Attempt]] = {}
        """Launches that were given up by who asked, and when they arrive."""
        self._ends_under_way: dict[str, int] = {}

    # ------------------------------------------------------------------------------------- the port

    def nodes(self) -> tuple[Node, ...]:
        def answer() -> tuple[Node, ...]:
            if not self.silent:
                self._known = tuple(node for name, node in self.all_nodes.items() if name in self.up)
            return self._known  # a head that does not answer has taken no node away

        return self._faults.around("engine nodes", ("crash-before", "lost"), answer, _silent())

    def launch(self, attempt: Attempt) -> None:
        def start() -> None:
            if self.silent:
                raise _silent()
            self._begin(attempt)

        if self._faults.strike("engine launch arrives", ("late",)):
            self._under_way.setdefault(attempt.name, (self._clock() + self._chance.randrange(20_000), attempt))
            raise _silent()
        self._faults.around("engine launch", [kind for kind in CALL if kind != "late"], start, _silent())

    def liveness(self, attempt: Attempt) -> Liveness:
        def look() -> Liveness:
            if self.silent or attempt.name in self._under_way:
                return Liveness.UNKNOWN
            body = self._running.get(attempt.name)
            if body is None:
                return Liveness.GONE
            if body.driver:
                return Liveness.ALIVE
            self._gone(body)  # what is left without a driver is ended, and then it is gone
            return Liveness.GONE

        try:
            return self._faults.around("engine liveness", ("crash-before", "lost", "stall"), look, _silent())
        except EngineError:
            return Liveness.UNKNOWN

    def end(self, attempt: Attempt) -> bool:
        def stop() -> bool:
            if self.silent:
                return False
            self._under_way.pop(attempt.name, None)
            if attempt.name in self._running:
                self._gone(self._running[attempt.name])
            return True

        if self._faults.strike("engine end arrives", ("late",)):
            self._ends_under_way[attempt.name] = self._clock() + self._chance.randrange(20_000)
            return False
        try:
            return self._faults.around("engine end", [kind for kind in CALL if kind != "late"], stop, _silent())
        except EngineError:
            return False

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        kept = {attempt.name for attempt in keep}
        left = [name for name in self._running if name not in kept]
        for name in left:
            self._gone(self._running[name])
        return left

    def facts(self) -> Mapping[str, Any]:
        return {"engine": self.name}

    def close(self) -> None: ...

    # ------------------------------------------------------------------------------------- what happens by itself

    def advance(self) -> None:
        """Up to now: calls that were late arrive, attempts take their next steps, and some end."""
        now = self._clock()
        for name, at in list(self._ends_under_way.items()):
            if at <= now:
                del self._ends_under_way[name]
                self._under_way.pop(name, None)
                if name in self._running:
                    self._gone(self._running[name])
        for name, (at, attempt) in list(self._under_way.items()):
            if at <= now:
                del self._under_way[name]
                if all(grant.node in self.up for grant in attempt.grants):
                    self._begin(attempt)
        for body in [each for each in self.lives if each.gone is None]:
            if body.until and body.until <= now:
                self._gone(body)
            elif body.driver and not body.exited:
                self._step(body, now)

    def bodies(self) -> list[Body]:
        """Attempts of which processes are there and that are not cut off."""
        return list(self._running.values())

    def kill_driver(self, body: Body) -> None:
        """Its members stay until somebody looks after it."""
        body.driver = False
        self._close(body)

    def kill_member(self, body: Body) -> None:
        """A map puts another in its place; a gang ends as a whole."""
        if body.driver and not body.exited and body.gang:
            self._exit(body, "LOST", "worker-lost")

    def lose(self, name: str) -> None:
        """A node dies with everything on it."""
        self.up.discard(name)
        for body in self._on(name):
            if body.grants[0].node == name:
                self.kill_driver(body)
                if all(grant.node == name for grant in body.grants):
                    self._gone(body)
            elif not body.exited and body.driver:
                self._exit(body, "LOST", "peer-lost" if body.gang else "worker-lost")

    def cut(self, name: str) -> None:
        """A node loses its network: the engine takes it for dead, and what runs on it goes on for a while."""
        self.up.discard(name)
        for body in self._on(name):
            if all(grant.node == name for grant in body.grants):
                body.cut, body.until = True, self._clock() + self._chance.randrange(1, ZOMBIE_MS)
                self._running.pop(body.attempt.name, None)
            elif body.grants[0].node == name:
                self.kill_driver(body)
            elif not body.exited and body.driver:
                self._exit(body, "LOST", "peer-lost" if body.gang else "worker-lost")

    def restore(self, name: str) -> None:
        """The node is back, empty: whatever went on there while it was cut off has ended."""
        self.up.add(name)
        for body in self.lives:
            if body.cut and body.gone is None and body.grants[0].node == name:
                self._gone(body)

    def heal(self) -> None:
        """Every node is back, the head answers, and nobody is cut off any more."""
        self.silent = False
        for name in self.all_nodes:
            self.restore(name)

    def die(self) -> None:
        """The whole engine dies with every attempt; it comes back empty."""
        self._under_way.clear()
        for body in self.bodies():
            self._gone(body)

    # ------------------------------------------------------------------------------------- a life

    def _begin(self, attempt: Attempt) -> None:
        if attempt.name in self._running or attempt.paths.exit.exists() or fenced_off(attempt.paths):
            return
        if not all(grant.node in self.up for grant in attempt.grants):
            raise EngineError("A node of the attempt is gone.")
        self._under_way.pop(attempt.name, None)
        due = self._clock() + self._chance.choice((0, 500, 3000))
        body = Body(attempt.job_id, attempt.number, attempt.grants, self._head(), attempt=attempt, due=due)
        self._running[attempt.name] = body
        self.lives.append(body)

    def _gone(self, body: Body) -> None:
        """Its processes are no more."""
        self._close(body)
        body.gone = self._head()
        if self._running.get(body.attempt.name) is body:
            del self._running[body.attempt.name]

    def _close(self, body: Body) -> None:
        if body.records is not None:
            body.records.close()
            body.records = None

    def _on(self, name: str) -> list[Body]:
        return [body for body in self.bodies() if any(grant.node == name for grant in body.grants)]

    def _step(self, body: Body, now: int) -> None:
        attempt = body.attempt
        if body.records is None:
            if now >= body.due:
                body.records = Records(attempt.paths.records())
                body.due = now + self._lasts(body)
                self._say(body, "started", now)
            return
        os.utime(attempt.paths.records(), ns=(now * 1_000_000, now * 1_000_000))
        if attempt.paths.stop.exists():
            body.stop_at = body.stop_at or now + self._chance.choice((0, 1000, 4000, 60_000))
        stopping = 0 < body.stop_at <= now
        if now < body.due and not stopping:
            return
        body.due = now + self._lasts(body)
        try:
            check_fence(attempt.paths)
            if stopping and body.gang:
                self._checkpoint(body, now)
            if stopping:
                self._exit(body, "STOPPED", "stopped")
            elif body.gang:
                self._train(body, now)
            else:
                self._compute(body, now)
        except StaleError as error:
            self.refused += 1
            self._exit(body, "SUPERSEDED", error.code)

    def _compute(self, body: Body, now: int) -> None:
        """Publish the part that was begun, begin the next one, or publish the results."""
        ledger = self._ledger(body.attempt)
        keys = _keys(body.attempt)
        if body.began is not None:
            key = body.began.name
            folder = ledger.begin(key, f"{body.job_id}.{body.number}")
            (folder / "out.txt").write_text(key)
            _, first = ledger.publish(key, folder, {"state": "DONE", "writer": f"{body.job_id}.{body.number}"})
            self._wrote(body)
            if first:
                self.first_publications.append(key)
            self._say(body, "part", now, name=key, state="DONE", first=first)
            body.began = None
        waiting = [key for key in keys if ledger.find(key) is None]
        if waiting:
            body.began = Path(self._chance.choice(waiting))
        else:
            self._publish(body)

    def _train(self, body: Body, now: int) -> None:
        done = self.trained.get(f"{body.attempt.name}+", self.trained.get(body.job_id, 0)) + 1
        self.trained[f"{body.attempt.name}+"] = done
        if done >= body.attempt.spec.params["steps"]:
            self._publish(body)
        elif done % _STEPS_PER_CHECKPOINT == 0:
            self._checkpoint(body, now)

    def _checkpoint(self, body: Body, now: int) -> None:
        done = self.trained.get(f"{body.attempt.name}+", 0)
        if done > self.trained.get(body.job_id, 0):
            self.trained[body.job_id] = done
            self._wrote(body)
            self._say(body, "checkpoint", now)

    def _publish(self, body: Body) -> None:
        self.results.add(body.job_id)
        self._wrote(body)
        if self._chance.random() < 0.1:
            self.kill_driver(body)  # between the results and the word about them
        else:
            self._exit(body, "SUCCEEDED", "ended")

    def _exit(self, body: Body, outcome: str, reason: str) -> None:
        with self._faults.armed(False):
            write_json(body.attempt.paths.exit, {"outcome": outcome, "reason": reason, "sentence": "."})
        body.exited = True
        self._close(body)
        if self._chance.random() < 0.5 and not body.cut:
            body.until = self._clock() + 1 + self._chance.randrange(5000)

    def _wrote(self, body: Body) -> None:
        self.writes.append((body.job_id, body.number, self._head()))

    def _say(self, body: Body, kind: str, now: int, **values: Any) -> None:
        assert body.records is not None
        body.records.write(kind, **values)
        os.utime(body.attempt.paths.records(), ns=(now * 1_000_000, now * 1_000_000))

    def _lasts(self, body: Body) -> int:
        return int(body.attempt.spec.params["seconds"] * 1000 * self._chance.uniform(0.5, 1.5))

    def _ledger(self, attempt: Attempt) -> Ledger:
        return Ledger(HomePaths(attempt.home).ledger, attempt.spec.scope())


def _keys(attempt: Attempt) -> list[str]:
    params = attempt.spec.params
    names = (f"{attempt.spec.account}/{params['bag']}/{number}" for number in range(params["parts"]))
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]


def _silent() -> EngineError:
    return EngineError("The engine did not answer (as the test asked).")
