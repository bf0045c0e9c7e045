"""Taking the decisions of the log again: the same state, the same `decide`, the same plan?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from permed_compute.admission.commit import rows
from permed_compute.admission.decide import decide
from permed_compute.admission.fold import SpecOf, State
from permed_compute.admission.snapshot import Plan
from permed_compute.queue.port import Event


@dataclass(frozen=True, slots=True)
class Replayed:
    """`moves` admissions, promises and preemptions of `decisions` decisions; `different`: sequence numbers of those
    that the same state, policy and moment do not lead to."""

    decisions: int
    moves: int
    different: tuple[int, ...]


def replay(events: Iterable[Event], spec_of: SpecOf, adapt: Callable[[Plan], Plan] = lambda plan: plan) -> Replayed:
    """Fold the log to each decision's state and take it again. `adapt` is what the controller does to a plan before it
    commits it. Raises `ValueError` where the log has a gap."""
    known = list(events)
    wanted: dict[tuple[int, int], list[Event]] = {}
    for event in known:
        told = event.data.get("decision") or event.data.get("detail", {}).get("decision")
        if event.action == "MOVED" and told and _decided(event, told):
            wanted.setdefault((int(told["seq"]), int(told["now"])), []).append(event)
    state = State(spec_of)
    at = iter(known)
    different: list[int] = []
    for (seq, now), moves in sorted(wanted.items(), key=lambda item: item[0]):
        while state.seq < seq:
            state.apply(next(at))
        plan = adapt(decide(state.snapshot(now), state.policy(now)[0], now))
        again = _outcomes(plan)
        different += [event.seq for event in moves if again.get(event.job_id) != _outcome(event)]
    return Replayed(len(wanted), sum(map(len, wanted.values())), tuple(different))


def _decided(event: Event, told: dict[str, Any]) -> bool:
    """The move that the decision made, not a later one of the same job that carries its detail on."""
    return event.reason == told["reason"] and event.after in ("RESERVED", "PREEMPTING", "QUEUED")


def _outcome(event: Event) -> tuple[str, Any]:
    detail = event.data.get("detail", {})
    if event.after == "RESERVED":
        return event.reason, detail.get("grants")
    return event.reason, detail.get("promised") if event.reason == "promised" else detail.get("for", "")


def _outcomes(plan: Plan) -> dict[str, tuple[str, Any]]:
    made: dict[str, tuple[str, Any]] = {stop.job_id: (stop.reason, stop.for_job) for stop in plan.preemptions}
    made |= {promise.job_id: ("promised", _json(rows(promise.grants))) for promise in plan.promises}
    made |= {new.job_id: (new.reason, _json(rows(new.grants))) for new in plan.admissions}
    return made


def _json(grants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**grant, "devices": list(grant["devices"])} for grant in grants]
