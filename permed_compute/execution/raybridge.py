"""A process of its own that speaks Ray for the controller, one JSON line per request and per answer.

Ray's client ends the process that it lives in when the cluster's head dies, takes over its signal handlers, and can
block for a minute. None of that may happen to a controller: so ray is imported here and in the workers, and when this
process dies or does not answer, the controller ends it and starts another. Attempts are detached and do not notice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permed_compute.errors import EngineError
from permed_compute.paths import AttemptPaths

Row = dict[str, Any]

NODE_LABEL = "permed-node"
"""`ray start --labels permed-node=gpu-07` calls the node so."""

_CONNECT_S = 3.0
_LAST_S = 0.5
"""How long an attempt's actors may take to die with their group, and Ray to know it, before `end` returns."""
_OVERDUE_S = 60.0
"""By then a raylet has ended them, or is known to be dead itself."""


class BridgeError(EngineError):
    """Ray did not answer, or not in time: nothing is known."""

    code = "engine-silent"


class Bridge:
    """The controller's end. One request at a time."""

    def __init__(self, address: str, namespace: str, environment: Mapping[str, str], log: Path) -> None:
        self.address = address
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "permed_compute.execution.raybridge", address, namespace],
                env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                cwd=log.parent, start_new_session=True,
            )  # fmt: skip
        self._answers: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._asked = 0
        self._heard = time.monotonic()
        threading.Thread(target=self._listen, name="permed-ray-bridge", daemon=True).start()

    @property
    def usable(self) -> bool:
        return self._process.poll() is None

    @property
    def silent_s(self) -> float:
        """Seconds since its last answer, or its start."""
        return time.monotonic() - self._heard

    def ask(self, call: str, timeout_s: float, **arguments: Any) -> Any:
        """The answer. Raises `BridgeError` where none comes in time, `EngineError` where Ray refuses."""
        self._asked += 1
        line = json.dumps({"id": self._asked, "call": call, "arguments": arguments})
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise BridgeError("The process that speaks to Ray is gone.") from None
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise BridgeError(f"Ray did not answer within {timeout_s:g} s.") from None
            if answer is None:
                raise BridgeError("The process that speaks to Ray is gone.")
            self._heard = time.monotonic()
            if answer["id"] != self._asked:
                continue  # of a request that was given up
            if "error" in answer:
                raise EngineError(f"Ray refuses to {call}: {answer['error']}")
            return answer["value"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not taken of the last request
                    pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._answers.put(json.loads(line))
        except ValueError:  # closed under us, or not JSON: either way there is nobody to talk to
            pass
        self._answers.put(None)


# --------------------------------------------------------------------------------------------- the process


class _Speaker:
    """Everything below runs in the process of its own."""

    def __init__(self, address: str, namespace: str) -> None:
        import ray

        self._ending: dict[str, float] = {}
        """Attempts whose group has been removed, and since when."""
        self.ray: Any = ray
        self.ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )

    def launch(self, name: str, root: str, bundles: list[Row], nodes: list[str], engine: Row) -> None:
        """Group, members and actor, each unless it is there: launching again finds them, and mends a launch cut in two.

        `nodes`: by name, where each bundle belongs; [] leaves that to Ray.
        The members are hired here, so that their processes start beside the actor's and not after it.
        """
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from permed_compute.execution.port import Attempt
        from permed_compute.execution.raycrew import AttemptActor, hire_all, variables

        if name in self._actors():
            return
        ids = {row["name"]: row["id"] for row in self.nodes()} if nodes else {}
        gone = sorted({node for node in nodes if node not in ids})
        if gone:
            raise LookupError(f"node {gone[0]} is gone")
        group = self._group(name) or placement_group(
            bundles, strategy="PACK", name=name, lifetime="detached",
            bundle_label_selector=[{"ray.io/node-id": ids[node]} for node in nodes] or None,
        )  # fmt: skip
        attempt = Attempt.read(AttemptPaths(Path(root)))
        if attempt is not None:
            hire_all(attempt, group)
        # In the group but on none of its CPUs: those are the members', and what they start below them.
        self.ray.remote(AttemptActor).options(
            name=name, lifetime="detached", get_if_exists=True, max_restarts=0, num_cpus=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True),
            runtime_env={"env_vars": variables(name, AttemptPaths(Path(root)), "driver")},
        ).remote(root, engine)  # fmt: skip

    def names(self) -> Row:
        """Attempts that have an actor, those that have a group, and those of which members are left."""
        table = self.ray.util.placement_group_table()
        groups = {row["name"] for row in table.values() if row["state"] != "REMOVED"}
        return {
            "actors": self._actors(), "groups": sorted(name for name in groups if name and self._group(name)),
            "members": sorted({name.partition("/")[0] for name in self._named() if "/" in name}),
        }  # fmt: skip

    def end(self, name: str) -> None:
        """Remove the group: driver and members die with it, and Ray lists them until they have.

        One that was killed by name would not be listed from that moment on, wherever its process is. So that is done
        only with what has not begun, and may wait for a group that never was; and with what Ray, its head having been
        away, holds for living long after its node has ended it.
        """
        group = self._group(name)
        if group is not None:
            self.ray.util.remove_placement_group(group)
        end = time.monotonic() + _LAST_S
        while (left := self._named(name)) and time.monotonic() < end:
            time.sleep(0.02)
        since = self._ending.setdefault(name, end)
        for actor in left:
            if time.monotonic() - since > _OVERDUE_S or self._state(actor) != "ALIVE":
                self._kill(actor)
        if not left:
            del self._ending[name]

    def nodes(self) -> list[Row]:
        return living(self.ray.nodes())

    def stranded(self, name: str, nodes: list[str]) -> bool:
        """Whether the attempt has not begun, and never will: one of the nodes that it is bound to is gone."""
        return not {row["name"] for row in self.nodes()}.issuperset(nodes) and self._state(name) != "ALIVE"

    def unheard(self, nodes: list[str]) -> bool:
        """Whether one of these takes no connection though Ray has it among the living: soon it will know better."""
        there = [row for row in self.nodes() if row["name"] in nodes]
        return not all(holds(row["address"], row["port"], 0.0) for row in there)

    def want(self, bundles: list[Row], selectors: list[dict[str, str]]) -> None:
        """The cluster's autoscaler is to have room for these, used or not; the last call counts."""
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles, bundle_label_selectors=selectors or None)

    def version(self) -> str:
        return str(self.ray.__version__)

    def _actors(self) -> list[str]:
        """Names of attempts, without their members'."""
        return [name for name in self._named() if "/" not in name]

    def _named(self, attempt: str = "") -> list[str]:
        """Names of actors: drivers have their attempt's, members `<attempt>/…`."""
        names = [name for name in self.ray.util.list_named_actors() if isinstance(name, str)]
        return [name for name in names if not attempt or name.partition("/")[0] == attempt]

    def _kill(self, name: str) -> None:
        with contextlib.suppress(ValueError):
            self.ray.kill(self.ray.get_actor(name))

    def _state(self, name: str) -> str:
        """ALIVE from its constructor's end; '' where there is none of that name."""
        from ray._private import state  # the public one asks a dashboard

        try:
            return str(state.actors(self.ray.get_actor(name)._actor_id.hex()).get("State", ""))
        except ValueError:
            return ""

    def _group(self, name: str) -> Any | None:
        try:
            return self.ray.util.get_placement_group(name)
        except ValueError:
            return None


def holds(address: str, port: int, for_s: float) -> bool:
    """Whether a node's daemon takes a connection, and keeps it for so long: one that is being ended takes it, too."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_S) as held:
            return not _closed_within(held, for_s)
    except OSError:
        return False


def _closed_within(held: socket.socket, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        held.settimeout(left)
        try:
            if not held.recv(4096):
                return True
        except TimeoutError:
            break
    return False


def living(nodes: list[Row]) -> list[Row]:
    """What the cluster's living nodes have, of `ray.nodes()`. A node is called by its label `permed-node`, else by its
    address, with the beginning of its id where several have that."""
    alive = [node for node in nodes if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    rows = []
    for node in alive:
        identity, address = node["NodeID"], node["NodeManagerAddress"]
        plain = address if addresses.count(address) == 1 else f"{address}-{identity[:6]}"
        labels = dict(node.get("Labels") or {})
        rows.append({
            "name": labels.get(NODE_LABEL, plain), "id": identity, "address": address, "port": node["NodeManagerPort"],
            "resources": node["Resources"], "labels": labels,
        })  # fmt: skip
    return rows


def serve(address: str, namespace: str) -> None:
    """Answer requests until the controller closes the pipe."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    speaker = _Speaker(address, namespace)
    while True:
        request = json.loads(requests.get())
        answer: Row = {"id": request["id"]}
        try:
            answer["value"] = getattr(speaker, request["call"])(**request["arguments"])
        except Exception as error:  # noqa: BLE001 - the controller decides what a refusal means
            answer["error"] = f"{type(error).__name__}: {error}"[:500]
        out.write(json.dumps(answer) + "\n")


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # the controller is gone; Ray's own exit could block


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
