"""The loop that a researcher writes on bare Ray: actors, and a part to whichever is free (`ray.wait`).

python bare_loop.py ADDRESS WORKERS PARTS STEPS [FOLDER]: with FOLDER each part writes its result there, by rename.
Prints JSON: seconds from the first part's start to the last one's end, and the sum of what they computed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from pathlib import Path

import ray
from burn import burn


@ray.remote(num_cpus=1)
class Worker:
    """Computes parts."""

    def part(self, number: int, steps: int, folder: str) -> tuple[float, float, int]:
        """(began, ended, value)."""
        began = time.time()
        value = burn(steps, number)
        if folder:
            new = Path(folder) / f".part-{number}.{os.getpid()}"
            new.write_text(json.dumps({"value": value}), encoding="ascii")
            new.replace(Path(folder) / f"part-{number}.json")
        return began, time.time(), value


def main(address: str, workers: int, parts: int, steps: int, folder: str) -> dict[str, float]:
    """Hand all parts out and wait for them."""
    ray.init(address=address, log_to_driver=False, logging_level="error")
    free = [Worker.remote() for _ in range(workers)]
    waiting, flying, done = deque(range(parts)), {}, []
    while waiting or flying:
        while waiting and free:
            worker = free.pop()
            flying[worker.part.remote(waiting.popleft(), steps, folder)] = worker
        landed, _ = ray.wait(list(flying), num_returns=1)
        for part in landed:
            free.append(flying.pop(part))
            done.append(ray.get(part))
    return {
        "seconds": max(ended for _, ended, _ in done) - min(began for began, _, _ in done),
        "sum": sum(value for _, _, value in done),
    }


if __name__ == "__main__":
    told = main(sys.argv[1], *map(int, sys.argv[2:5]), (sys.argv[5:] or [""])[0])
    print(json.dumps(told))
