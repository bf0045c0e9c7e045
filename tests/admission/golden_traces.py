"""Digests of small simulated traces: every decision, and every figure. Run by `test_golden.py` in processes of its own.

`python tests/admission/golden_traces.py > tests/admission/golden_traces.json` after a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from permed_compute.admission.decide import decide
from permed_compute.admission.measures import series, summary
from permed_compute.admission.policy import Policy
from permed_compute.admission.simulate import Faults, Rules, Simulation
from permed_compute.admission.snapshot import Plan, Snapshot
from permed_compute.admission.traces import MINUTE_MS, Trace, flood, hospital_day, saturated
from permed_compute.queue.memory import MemoryQueue

RUNS: dict[str, tuple[Trace, Rules, Faults]] = {
    "hospital day": (hospital_day(scale=0.35, seed=4), Rules(cycle=30_000), Faults()),
    "hospital day with faults": (
        hospital_day(scale=0.3, seed=8),
        Rules(cycle=30_000),
        Faults(8, node_losses=4, lost_acks=100, duplicate_acks=100, late_exits=100),
    ),
    "flood": (flood(hours=2, gpus=8, factor=2), Rules(cycle=30_000), Faults()),
    "saturated": (saturated(900, gpus=64), Rules(cycle=15 * MINUTE_MS, launch=0, batched=True), Faults()),
}


def digests() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (trace, rules, faults) in RUNS.items():
        policy = trace.policy or Policy()
        told = hashlib.sha256()
        names: dict[str, str] = {}

        def listening(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
            plan = decide(snapshot, policy, now)
            names.update((each.job_id, each.name) for each in (*snapshot.live, *snapshot.waiting))  # noqa: B023
            text = json.dumps(asdict(replace(plan, waits=tuple(plan.waits))), sort_keys=True, default=str)
            for job_id in sorted({key for key in names if key in text}):  # noqa: B023 - ids are drawn by chance
                text = text.replace(job_id, names[job_id])  # noqa: B023
            told.update(text.encode())  # noqa: B023
            return plan

        outcome = Simulation(trace, policy, MemoryQueue, decide=listening, rules=rules, faults=faults).run()
        figures = json.dumps([summary(outcome, policy), series(outcome)], sort_keys=True).encode()
        yield (
            name,
            {
                "cycles": outcome.cycles,
                "decisions": told.hexdigest(),
                "figures": hashlib.sha256(figures).hexdigest(),
            },
        )


if __name__ == "__main__":
    print(json.dumps(dict(digests()), indent=1))
