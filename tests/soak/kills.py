"""Kill the controller, a worker and the whole Ray with -9 at random moments of one job, and count what is left.

    python tests/soak/kills.py --kills 20 --parts 40 --seed 1

Prints its counts as JSON and exits 1 where a promise is broken: every part published exactly once, no orphan process,
the audit chain intact, the job SUCCEEDED.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from permed_compute.client import open_client
from permed_compute.execution import records
from permed_compute.paths import HomePaths, read_json
from permed_compute.queue.events import Anchor, verify
from permed_compute.settings import resolve
from permed_compute.spec import JobSpec
from permed_compute.states import ENDED, JobState

CODE = """
    import hashlib, time
    from permed_compute import Map, Part, PartResult

    def plan(spec, state, ctx):
        return [Part(f"part-{n:03d}", inputs=(str(n),), params={"n": n}) for n in range(spec.params["count"])]

    def run(part, model, ctx):
        time.sleep(ctx.spec.params["seconds"])
        (ctx.out / "out.txt").write_text(hashlib.sha256(str(part.params["n"]).encode()).hexdigest())
        return PartResult(values={"n": part.params["n"]})

    chaos = Map(plan=plan, run=run)
"""
TARGETS = ("controller", "worker", "ray")


def controller(home: Path, anchor: Path) -> subprocess.Popen[bytes]:
    """The daemon as an operator starts it."""
    start = [sys.executable, "-c", "from permed_compute.cli import main; main()", "--home", str(home), "controller"]
    return subprocess.Popen(start, env={**os.environ, "PERMED_ANCHOR": str(anchor), "PERMED_EXECUTOR": "ray"})


def ours(home: HomePaths) -> Iterator[psutil.Process]:
    """Every process but this one that belongs to the home: by its environment, its command line or its session."""
    marks = (str(home.root), str(home.runtime))
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            words = " ".join(process.cmdline())
            attempt = process.environ().get("PERMED_ATTEMPT", "")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if any(mark in words for mark in marks) or (attempt and _is_of(home, attempt)):
            yield process


def _is_of(home: HomePaths, attempt: str) -> bool:
    return any(path.name in attempt for path in home.jobs.iterdir())


def workers(home: HomePaths) -> list[psutil.Process]:
    found = []
    for process in ours(home):
        try:
            if process.environ().get("PERMED_ATTEMPT") and "ray::" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ray_processes(home: HomePaths) -> list[psutil.Process]:
    found = []
    for process in ours(home):
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ray" in words and "controller" not in words.split()[-1:]:
            found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> int:
    count = 0
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
            count += 1
        except psutil.NoSuchProcess:
            continue
    return count


def chaos(folder: Path, *, kills: int, parts: int, seconds: float, seed: int) -> dict[str, object]:
    """Run it; returns the counts."""
    chance = random.Random(seed)
    home, anchor, code = HomePaths(folder / "home").create(), folder / "anchor", folder / "code"
    code.mkdir()
    (code / "toy_chaos.py").write_text(textwrap.dedent(CODE))
    spec = JobSpec.model_validate(
        {
            "name": "chaos",
            "workload": "toy_chaos:chaos",
            "code": str(code),
            "retries": 20,
            "time_limit": "2h",
            "params": {"count": parts, "seconds": seconds},
            "resources": {"workers": "1..2", "cpus": 1, "memory": "1GiB"},
        }
    )
    settings = resolve({"home": str(home.root), "anchor": str(anchor), "executor": "ray"}, {})
    daemon = controller(home.root, anchor)
    began, done = time.monotonic(), Counter[str]()
    _until(lambda: home.socket.exists(), 60)
    with open_client(settings) as client:
        job_id = client.submit(spec)[0].id
    _until(lambda: bool(list(home.job(job_id).root.glob("attempts/*/records-*"))), 120)
    # Spread over the job's first three quarters; where two fall together, the second hits it while it recovers.
    for due in sorted(chance.randrange(parts * 3 // 4) for _ in range(kills)):
        _until(lambda due=due: _published(home) >= due or _state(settings, job_id) in ENDED, 300)
        time.sleep(chance.uniform(0.1, 2.0))
        target = chance.choice(TARGETS)
        if target == "controller":
            daemon.kill()
            daemon.wait()
            done[target] += 1
            daemon = controller(home.root, anchor)
        elif target == "worker":
            _until(lambda: workers(home) or _state(settings, job_id) in ENDED, 120)
            alive = workers(home)
            done[target] += kill([chance.choice(alive)]) if alive else 0
        else:
            _until(lambda: ray_processes(home) or _state(settings, job_id) in ENDED, 120)
            done[target] += bool(kill(ray_processes(home)))
        print(
            f"{time.monotonic() - began:6.1f} s  kill {target:10}  {_published(home)} of {parts} published", flush=True
        )
    _until(lambda: _state(settings, job_id) in ENDED, 900)
    state = _state(settings, job_id)
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(60)
    return {
        "kills": dict(done), "seconds": round(time.monotonic() - began, 1), "state": state.value,
        **_count(home, job_id, parts), "orphans": [" ".join(p.cmdline())[:120] for p in ours(home)],
        "audit": _audit(settings, anchor),
    }  # fmt: skip


def _state(settings: object, job_id: str) -> JobState:
    end = time.monotonic() + 60
    while True:
        try:
            with open_client(settings) as client:
                return client.service.job(job_id).state
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _published(home: HomePaths) -> int:
    return len(list(home.ledger.glob("*/??/*/part.json")))


def _count(home: HomePaths, job_id: str, parts: int) -> dict[str, object]:
    attempts = sorted(home.job(job_id).root.glob("attempts/*"))
    first: Counter[str] = Counter()
    for attempt in attempts:
        rows, _ = records.read(attempt / "records-driver.jsonl")
        first.update(row["name"] for row in rows if row["kind"] == "part" and row.get("first"))
    shown = list(home.job(job_id).results.glob("parts/*/out.txt"))
    result = read_json(home.job(job_id).results / "result.json") or {"parts": []}
    return {
        "attempts": len(attempts), "parts": parts, "published": _published(home),
        "published_twice": sum(count > 1 for count in first.values()), "in_results": len(shown),
        "half_written": len(list(home.ledger.glob("*/.new/*"))),
        "states": dict(Counter(row["state"] for row in result["parts"])),
    }  # fmt: skip


def _audit(settings: object, anchor: Path) -> str:
    with open_client(settings) as client:
        verified = verify(client.queue, Anchor.of(anchor, client.home.root))
    return f"{verified.count} events intact"


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Whatever becomes of the run, none of its processes stays."""
    try:
        yield
    finally:
        kill(list(ours(HomePaths(folder / "home").create())))


def _until(true: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.2)


def broken(counts: dict[str, object], kills: int) -> list[str]:
    """Which promises were not kept."""
    said = {
        "not every part was published exactly once": counts["published"] != counts["parts"]
        or counts["published_twice"],
        "results are incomplete": counts["in_results"] != counts["parts"],
        "processes were left": counts["orphans"],
        "the job did not succeed": counts["state"] != "SUCCEEDED",
        "half-written parts were left": counts["half_written"],
        "it was killed less often than asked": sum(counts["kills"].values()) < kills,
    }
    return [words for words, bad in said.items() if bad]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parts", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="work per part")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="permed-chaos-") as folder, _nothing_left(Path(folder)):
        counts = chaos(Path(folder), kills=args.kills, parts=args.parts, seconds=args.seconds, seed=args.seed)
    complaints = broken(counts, args.kills)
    print(json.dumps({**counts, "broken": complaints}, indent=1))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
