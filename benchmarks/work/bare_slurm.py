"""The same bag of parts through Slurm alone: python bare_slurm.py array|submitit|dask WORKERS PARTS STEPS FOLDER.

Prints JSON: seconds from handing the bag over to having every result, the sum of what was computed, and the allocations
that were used. `part NUMBER STEPS FOLDER` is what each task of the plain array runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from burn import burn

_MEMORY_MIB = 512


def array(workers: int, parts: int, steps: int, folder: Path) -> tuple[int, int]:
    """An sbatch array, as many tasks at a time as the node has cores; every task writes its result as a file.

    Without `--wait`, which asks ever more seldom, and without `%`, which Slurm looks at only now and then.
    """
    command = f"{sys.executable} {Path(__file__).resolve()} part $SLURM_ARRAY_TASK_ID {steps} {folder}"
    subprocess.run(
        ["sbatch", "--quiet", f"--array=0-{parts - 1}", "--cpus-per-task=1",
         f"--mem={_MEMORY_MIB}M", "--time=10", "--output=/dev/null", "--wrap", command],
        check=True,
    )  # fmt: skip
    while len(list(folder.glob("*.done"))) < parts:
        time.sleep(0.05)
    return sum(int((folder / f"{number}.done").read_text()) for number in range(parts)), parts


def part(number: int, steps: int, folder: Path) -> None:
    made = folder / f"{number}.made"
    made.write_text(str(burn(steps, number)))
    made.rename(made.with_suffix(".done"))


def with_submitit(workers: int, parts: int, steps: int, folder: Path) -> tuple[int, int]:
    """submitit's job array, its own way to ask for many."""
    import submitit

    executor = submitit.SlurmExecutor(folder=folder, python=sys.executable)
    executor.update_parameters(
        time=10, cpus_per_task=1, mem=f"{_MEMORY_MIB}MB", array_parallelism=parts, use_srun=False
    )
    jobs = executor.map_array(burn, [steps] * parts, range(parts))
    return sum(job.result() for job in jobs), parts


def with_dask(workers: int, parts: int, steps: int, folder: Path) -> tuple[int, int]:
    """dask-jobqueue: an allocation for each worker, and the bag over them."""
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    with SLURMCluster(
        cores=1, processes=1, memory=f"{_MEMORY_MIB}MB", walltime="00:10:00", interface="lo", python=sys.executable,
        log_directory=str(folder), local_directory=str(folder), scheduler_options={"dashboard_address": None},
        job_script_prologue=[f"export PYTHONPATH={Path(__file__).parent}"],
    ) as cluster, Client(cluster) as client:  # fmt: skip
        cluster.scale(jobs=workers)
        futures = client.map(burn, [steps] * parts, range(parts), pure=False)
        return sum(client.gather(futures)), workers


if __name__ == "__main__":
    if sys.argv[1] == "part":
        part(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        began = time.perf_counter()
        side = {"array": array, "submitit": with_submitit, "dask": with_dask}[sys.argv[1]]
        total, allocations = side(*map(int, sys.argv[2:5]), Path(sys.argv[5]))
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "sum": total, "allocations": allocations}))
