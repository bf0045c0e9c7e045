"""The same bag of parts on an engine alone: python bare_bag.py tasks|data|dask ADDRESS WORKERS PARTS STEPS.

Prints JSON: seconds from handing the bag over to having every result, and the sum of what was computed. Connecting to
the engine is not counted; starting its workers is, as it is for ours.
"""

from __future__ import annotations

import json
import sys
import time

from burn import burn


def tasks(address: str, workers: int, parts: int, steps: int) -> tuple[float, int]:
    """Plain Ray tasks."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="error")
    part = ray.remote(num_cpus=ray.cluster_resources()["CPU"] / workers)(burn)  # so many at once
    began = time.perf_counter()
    total = sum(ray.get([part.remote(steps, number) for number in range(parts)]))
    return time.perf_counter() - began, total


def data(address: str, workers: int, parts: int, steps: int) -> tuple[float, int]:
    """Ray Data, a block per part."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    began = time.perf_counter()
    bag = ray.data.range(parts, override_num_blocks=parts)

    def compute(batch: dict) -> dict:
        return {"value": [str(burn(steps, int(number))) for number in batch["id"]]}

    # As tasks: a pool of actors on all cores would leave none to the tasks that make its blocks, for ever.
    done = bag.map_batches(compute, batch_size=1, num_cpus=ray.cluster_resources()["CPU"] / workers)
    total = sum(int(row["value"]) for row in done.take_all())
    return time.perf_counter() - began, total


def dask(address: str, workers: int, parts: int, steps: int) -> tuple[float, int]:
    """dask.distributed, worker processes of one thread."""
    from distributed import Client, LocalCluster

    began = time.perf_counter()
    with LocalCluster(
        n_workers=workers, threads_per_worker=1, dashboard_address=None, host="127.0.0.1", protocol="tcp"
    ) as cluster, Client(cluster) as client:  # fmt: skip
        futures = client.map(burn, [steps] * parts, range(parts), pure=False)
        total = sum(client.gather(futures))
        return time.perf_counter() - began, total


if __name__ == "__main__":
    seconds, total = {"tasks": tasks, "data": data, "dask": dask}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:6]))
    print(json.dumps({"seconds": seconds, "sum": total}))
