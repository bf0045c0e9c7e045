"""Thousands of seeded runs of the real controller on a real queue and a fake engine, with faults at every commit point.

    python tests/soak/faults.py --runs 10000 --seed 1

Every 25th run keeps its queue in a SQLite file, the others in memory; every 10th takes all decisions again. Prints what
happened, which commit points were struck by which fault, and the promises that were broken; exits 1 where there is one.
A run is repeated, event by event, by `--runs 1 --seed N --show`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.testing.storm import START, Outcome, Storm

SQLITE_EVERY, DECISIONS_EVERY = 25, 10
PROMISES = ("no job lost", "part published once", "capacity", "quota", "release", "orphan", "audit chain")
"""Always printed, 0 or not; any other that is broken is printed beside them."""


def outcome_of(seed: int, folder: Path) -> Outcome:
    """The run of one seed; nothing of it stays in `folder`."""
    own = folder / str(seed)
    store = (lambda clock: SqlQueue(sqlite_url(own / "queue.db"), clock)) if seed % SQLITE_EVERY == 0 else None
    return Storm(seed, own, store=store, decisions=seed % DECISIONS_EVERY == 0).run()


def some(seeds: tuple[int, ...]) -> tuple[Counter[str], Counter[str], Counter[str], dict[int, list[str]]]:
    """(counts, faults struck, points passed, seed → what broke) of several runs, in a folder that costs no disk."""
    logging.disable(logging.ERROR)
    counts, struck, passed = Counter[str](), Counter[str](), Counter[str]()
    broken: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory_folder()) as folder:
        for seed in seeds:
            outcome = outcome_of(seed, Path(folder))
            counts.update(outcome.counts)
            struck.update({f"{point}: {kind}": count for (point, kind), count in outcome.struck.items()})
            passed.update(outcome.passed)
            if outcome.broken:
                broken[seed] = [str(one) for one in outcome.broken]
    return counts, struck, passed, broken


def memory_folder() -> str | None:
    """Where a file costs no disk, if there is such a place: the runs sync what they write."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def show(seed: int) -> None:
    """One run, event by event: time after the start (ms), job (in order of submission), what, why, attempt."""
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory_folder()) as folder:
        outcome = outcome_of(seed, Path(folder))
    for seq, (at, job, action, after, reason, attempt) in enumerate(outcome.trace, start=1):
        print(f"{seq:5} {at - START:>9} {'' if job is None else job:>3} {action:9} {after:10} {reason} {attempt or ''}")
    print(json.dumps({"counts": outcome.counts, "broken": [str(one) for one in outcome.broken]}, indent=1))


def batches(runs: int, seed: int) -> Iterator[tuple[int, ...]]:
    """The seeds, by 50."""
    for first in range(seed, seed + runs, 50):
        yield tuple(range(first, min(first + 50, seed + runs)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; each run's is one more")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--show", action="store_true", help="the first run alone, event by event")
    args = parser.parse_args()
    if args.show:
        show(args.seed)
        return 0
    began = time.monotonic()
    counts, struck, passed = Counter[str](), Counter[str](), Counter[str]()
    broken: dict[int, list[str]] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        for part in pool.map(some, batches(args.runs, args.seed)):
            for total, more in zip((counts, struck, passed), part[:3], strict=True):
                total.update(more)
            broken |= part[3]
    took = time.monotonic() - began
    told = Counter({promise: 0 for promise in PROMISES})
    told.update(one.split(":")[0] for rows in broken.values() for one in rows)
    kinds = Counter[str]()
    for point, count in struck.items():
        kinds[point.rpartition(": ")[2]] += count
    print(json.dumps({
        "runs": args.runs, "first_seed": args.seed, "seconds": round(took, 1),
        "runs_per_minute": round(60 * args.runs / took), "counts": dict(sorted(counts.items())),
        "commit_points": dict(sorted(passed.items())), "faults": dict(kinds.most_common()),
        "faults_by_point": dict(sorted(struck.items())), "broken": dict(told),
    }, indent=1))  # fmt: skip
    for seed, rows in sorted(broken.items())[:10]:
        print(
            f"seed {seed}: {rows[0]} ({len(rows)} in all)\n  python tests/soak/faults.py --runs 1 --seed {seed} --show"
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
