"""The Ray executor: an attempt is one detached named actor in a detached placement group, and its members inside.

Launching twice finds the first; an attempt goes on when the controller dies, and the next one finds it by name. Ray is
started here, on loopback, when first needed (`raylocal`), or given by address; it is spoken to through `raybridge`.

GONE is said only when Ray lists neither actor nor member nor group and no process of the attempt is left on this
machine, or when the local Ray itself is dead and everything that bore its mark has been ended. What a raylet starts
after that ends at its gate (`raysetup`), where the attempt's fence is up. On a Ray that is given, processes that a job
detached on other nodes are Ray's to end.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from permed_compute.admission.demand import Demand, Shape, spread
from permed_compute.admission.snapshot import Gpu, Grant, Node
from permed_compute.errors import EngineError
from permed_compute.execution import cores, processes, raykeeper
from permed_compute.execution.context import fenced_off
from permed_compute.execution.cores import cores_file
from permed_compute.execution.device import flavor_of, local_node
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.processes import ATTEMPT_MARK, ProcessTable
from permed_compute.execution.raybridge import Bridge, BridgeError
from permed_compute.execution.raylocal import LocalRay, bridge_environment
from permed_compute.paths import AttemptPaths, HomePaths, read_json, write_json
from permed_compute.settings import Settings

log = logging.getLogger(__name__)

_ASK_S = 3.0
"""How long the controller waits for word of an attempt before it says UNKNOWN."""
_LAUNCH_S = 30.0
_GIVE_UP_S = 20.0
"""A connection without a word for so long is taken for dead: the next question makes a new one."""
_WANT_AGAIN_S = 10.0
_PREFIX = "permed-"
_GPU_FLAVOR, _GPU_MEMORY = "permed-gpu-flavor", "permed-gpu-memory"
_MIB = 2**20


class RayExecutor:
    """See `execution.port.Executor`. One per home: actors and groups stand in the home's namespace."""

    name = "ray"

    def __init__(self, settings: Settings, home: HomePaths) -> None:
        if importlib.util.find_spec("ray") is None:
            raise EngineError(
                "The executor is ray, which is not installed.",
                remedy="pip install 'permed-compute[ray]', or --executor inprocess.",
            )
        self._home, self._address = home, settings.ray_address
        digest = hashlib.sha256(str(home.root.resolve()).encode()).hexdigest()
        self._namespace = f"permed-{digest[:16]}"
        self._node = local_node(settings)
        self._local = None if settings.ray_address else LocalRay(home.runtime, self._node)
        self._bridge: Bridge | None = None
        self._there: tuple[Node, ...] = ()
        self._here: int | None = None
        self._wanted: Demand | None = None
        self._want_again = 0.0

    # ------------------------------------------------------------------------------------- the port

    def nodes(self) -> tuple[Node, ...]:
        """This machine, without asking Ray; or what the cluster at the given address has."""
        if self._local is not None:
            return (self._node,)
        try:  # known ones do not keep the controller waiting for a head that is gone
            self._there = tuple(_node(row) for row in self._ask("nodes", _ASK_S if self._there else _LAUNCH_S))
        except BridgeError:  # a head that does not answer has taken no node away
            if not self._there:
                raise
        return self._there

    def start(self) -> None:
        """See to it that there is a Ray; otherwise the first launch does. Raises `EngineError`."""
        if self._local is None:
            self._connected(self._address)
            return
        self._say_here()
        session = self._local.find()
        if session is not None and not self._local.fits(session) and not self._attempts_here():
            session = None
        if session is None:
            self._disconnect()
            session = self._local.start()
        self._connected(session.address)

    def launch(self, attempt: Attempt) -> None:
        if attempt.paths.exit.exists() or fenced_off(attempt.paths):
            return
        self.start()
        self._choose_cores(attempt)
        bundles = [_bundle(grant) for grant in attempt.grants]
        nodes = [grant.node for grant in attempt.grants] if self._local is None else []
        try:
            self._ask(
                "launch", _LAUNCH_S, name=attempt.name, root=str(attempt.paths.root), bundles=bundles,
                nodes=nodes, engine=dict(self.facts()),
            )  # fmt: skip
        except BridgeError:
            self._disconnect()  # so that nothing is launched after we have said that it was not
            raise

    def liveness(self, attempt: Attempt) -> Liveness:
        try:
            known = self._known()
            if attempt.name in known["actors"] and not self._asked_of_nodes("stranded", attempt, name=attempt.name):
                return Liveness.ALIVE
            # Where it ended with a node of which Ray does not know yet that it died, that is not all, nor why.
            gone = self._clear(attempt.name, known) and not self._asked_of_nodes("unheard", attempt)
            return Liveness.GONE if gone else Liveness.UNKNOWN
        except EngineError as error:
            log.info("%s: %s", attempt.name, error.message)
            return Liveness.UNKNOWN

    def end(self, attempt: Attempt) -> bool:
        return self._end(attempt.name)

    def want(self, demand: Callable[[], Demand]) -> None:
        """Of a Ray that is given: its autoscaler, where the site runs one, gets nodes for this, and lets others go."""
        if self._local is not None or time.monotonic() < self._want_again or (wanted := demand()) == self._wanted:
            return
        shapes = list(spread(wanted))
        selectors = [{_GPU_FLAVOR: shape.flavor} if shape.flavor else {} for shape in shapes]
        try:
            self._ask("want", _ASK_S, bundles=[_bundle(shape) for shape in shapes], selectors=selectors)
            self._wanted = wanted
        except EngineError as error:
            self._want_again = time.monotonic() + _WANT_AGAIN_S
            log.info("what waits was not told to Ray's autoscaler: %s", error.message)

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        kept = {attempt.name for attempt in keep}
        try:
            known = self._known()
        except EngineError as error:
            log.warning("not swept: %s", error.message)
            return []
        found = {*known["actors"], *known["groups"], *known["members"], *self._attempts_here()}
        return [name for name in sorted(found - kept) if name.startswith(_PREFIX) and self._end(name)]

    def facts(self) -> Mapping[str, Any]:
        return {
            "engine": self.name, "version": importlib.metadata.version("ray"), "address": self._where(),
            "nodes": 1 if self._local is not None else None,
        }  # fmt: skip

    def close(self) -> None:
        """Leave the local Ray only where an attempt still lives in it; it is found again by the next controller."""
        if self._local is not None and not self._attempts_here():
            self.stop()
        self._disconnect()
        if self._here is not None:
            os.close(self._here)
            self._here = None

    def stop(self) -> bool:
        """End the local Ray with everything in it. True once no process of it is left."""
        self._disconnect()
        return self._local is None or self._local.stop()

    # ------------------------------------------------------------------------------------- attempts

    def _known(self) -> Mapping[str, list[str]]:
        """Attempts of which Ray has actor, group or members. A dead local Ray has none, once its rest is ended."""
        if self._local is not None:
            session = self._local.find()
            if session is not None:
                self._say_here()
            else:
                self._disconnect()
                if not self._local.stop():
                    raise EngineError("The local Ray is dead, and some of its processes cannot be ended.")
                return {"actors": [], "groups": [], "members": []}
            self._connected(session.address)
        answer: Mapping[str, list[str]] = self._ask("names", _ASK_S)
        return answer

    def _end(self, name: str) -> bool:
        try:
            if not processes.kill_attempt(name):
                return False
            known = self._known()
            if _has(known, name):
                self._ask("end", _LAUNCH_S, name=name)
            return self._clear(name, self._known())
        except EngineError as error:
            log.warning("end of %s not confirmed: %s", name, error.message)
            return False

    def _clear(self, name: str, known: Mapping[str, list[str]]) -> bool:
        """Free what an attempt has left. True once nothing is."""
        if _has(known, name):
            self._ask("end", _ASK_S, name=name)
            known = self._known()
        return processes.kill_attempt(name) and not _has(known, name)

    def _asked_of_nodes(self, call: str, attempt: Attempt, **arguments: Any) -> bool:
        """Of the nodes that it is bound to; on a Ray of our own there is but one, and no binding."""
        nodes = sorted({grant.node for grant in attempt.grants})
        return self._local is None and bool(self._ask(call, _ASK_S, nodes=nodes, **arguments))

    def _attempts_here(self) -> set[str]:
        """Attempts of this home with a process on this machine."""
        marks = ProcessTable().look().marked(ATTEMPT_MARK)
        names = {mark.rpartition("/")[0] for mark in marks.values()}
        return {name for name in names if (paths := self._paths_of(name)) is not None and paths.launch.exists()}

    def _paths_of(self, name: str) -> AttemptPaths | None:
        job_id, _, number = name.removeprefix(_PREFIX).rpartition("-")
        return self._home.job(job_id).attempt(int(number)) if job_id and number.isdigit() else None

    def _choose_cores(self, attempt: Attempt) -> None:
        """Write down where it may run, beside what runs: a later controller, and its workers, read it there."""
        if self._local is None or cores_file(attempt.paths).exists():
            return
        taken = []
        for name in self._attempts_here() - {attempt.name}:
            paths = self._paths_of(name)
            row = read_json(cores_file(paths)) if paths is not None else None
            taken.append({int(core): share for core, share in (row or {}).items()})
        here = sorted(os.sched_getaffinity(0))
        asked = [grant.cpu_milli for grant in attempt.grants]
        write_json(cores_file(attempt.paths), cores.choose(here, taken, asked))

    # ------------------------------------------------------------------------------------- Ray

    def _where(self) -> str:
        session = self._local.find() if self._local is not None else None
        return session.address if session is not None else self._address

    def _connected(self, address: str) -> Bridge:
        if self._bridge is not None and (self._bridge.address != address or not self._bridge.usable):
            self._disconnect()
        if self._bridge is None:
            self._home.runtime.mkdir(mode=0o700, exist_ok=True)
            self._bridge = Bridge(
                address,
                self._namespace,
                bridge_environment(self._local, address),
                self._home.runtime / "ray-bridge.log",
            )
        return self._bridge

    def _say_here(self) -> None:
        """Tell the session's keeper that a controller is there, for as long as this process lives or until `close`."""
        if self._here is None:
            self._home.runtime.mkdir(mode=0o700, exist_ok=True)
            self._here = raykeeper.say_here(self._home.runtime)

    def _disconnect(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
            self._bridge = None
        self._wanted = None  # another head knows nothing of it

    def _ask(self, call: str, timeout_s: float, **arguments: Any) -> Any:
        bridge = self._bridge or self._connected(self._where())
        try:
            return bridge.ask(call, timeout_s, **arguments)
        except BridgeError:
            if bridge.silent_s > _GIVE_UP_S:
                self._disconnect()
            raise


def _has(known: Mapping[str, list[str]], name: str) -> bool:
    return any(name in names for names in known.values())


def _bundle(worker: Grant | Shape) -> dict[str, float]:
    """What Ray is to count for one worker."""
    bundle = {"CPU": worker.cpu_milli / 1000, "memory": float(worker.memory * _MIB)}
    if worker.gpu_milli:
        bundle["GPU"] = worker.gpu_milli / 1000
    return bundle


def _node(row: Mapping[str, Any]) -> Node:
    """A node of a given cluster. Ray does not say how much memory a GPU has, nor that it is a MIG slice: labels may
    (`permed-gpu-memory=40960` in MiB, `permed-gpu-flavor=a100-mig-3g`), else 0 MiB and Ray's type are offered."""
    resources, labels = row["resources"], row["labels"]
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    flavor = labels.get(_GPU_FLAVOR) or (flavor_of(kinds[0]) if kinds else "gpu")
    memory = labels.get(_GPU_MEMORY, "")
    each = int(memory) if memory.isdigit() else 0
    gpus = tuple(Gpu(flavor, place, each) for place in range(int(resources.get("GPU", 0))))
    return Node(row["name"], int(resources.get("CPU", 0) * 1000), int(resources.get("memory", 0)) // _MIB, gpus)
