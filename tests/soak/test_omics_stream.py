"""250,000 people × 20,000 variants scored within 2 GiB, killed in the middle, resumed, identical."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from permed_compute.storage.genotypes import Header, Layout, Rows, assemble, write_part

SAMPLES, VARIANTS = 250_000, 20_000
LIMIT = 2 * 2**30


def simulate(root: Path) -> Path:
    """A store written block by block, 1.6 % missing; nothing is ever whole in memory."""
    layout = Layout(SAMPLES, VARIANTS, interchange=False)
    folders = []
    for part in range(layout.parts):
        start, stop = layout.rows(part)
        count = stop - start
        rng = np.random.default_rng(part)
        packed = np.full((count, layout.row_bytes), 255, np.uint8)
        for row in range(0, count, 100):
            for _ in range(3):
                packed[row : row + 100] &= np.frombuffer(rng.bytes(100 * layout.row_bytes), np.uint8).reshape(100, -1)
        text = [np.full(count, letter, object) for letter in ("A", "C")]
        ids = np.array([f"v{k}" for k in range(start, stop)], object)
        rows = Rows(
            np.zeros(count, np.int32), 1000 + np.arange(start, stop), ids, *text, packed, np.full(count, -1, np.int32),
            np.zeros(count, bool),
        )  # fmt: skip
        folders.append(root / f"part-{part}")
        write_part(folders[-1], layout, part, rows)
    header = Header([f"{k:032x}" for k in range(SAMPLES)], np.zeros(SAMPLES, np.int8), ["1"])
    assemble(root / "genotypes.zarr", layout, header, folders)
    return root / "genotypes.zarr"


def job_file(root: Path, store: Path) -> Path:
    rng = np.random.default_rng(9)
    rows = "".join(f"1\t{1000 + k}\tC\tA\t{rng.normal():.6f}\n" for k in range(VARIANTS))
    (root / "score.txt").write_text(
        "#pgs_id=BIG\nchr_name\tchr_position\teffect_allele\tother_allele\teffect_weight\n" + rows
    )
    file = root / "job.yaml"
    file.write_text(
        f"name: big\nworkload: omics/prs\ninputs:\n  - {{name: genotypes, path: {store}}}\n"
        "  - {name: score, path: score.txt}\nresources: {cpus: 1, memory: 2GiB}\ntime_limit: 2h\n"
    )
    return file


class Watched:
    """`permed run` as a process; `peak`: most resident bytes of it and all that it started."""

    def __init__(self, job: Path, home: Path) -> None:
        words = [sys.executable, "-m", "permed_compute.cli", "--home", str(home), "--executor", "inprocess", "run"]
        self.process = subprocess.Popen(
            [*words, str(job)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PERMED_TRACKING_URI": "none"},
        )  # fmt: skip
        self.peak = 0

    def look(self) -> bool:
        """False once it has ended."""
        try:
            tree = [psutil.Process(self.process.pid)]
            tree += tree[0].children(recursive=True)
            self.peak = max(self.peak, sum(one.memory_info().rss for one in tree))
        except psutil.Error:
            pass
        time.sleep(0.1)
        return self.process.poll() is None


def finished(home: Path) -> int:
    return len(list(home.glob("ledger/*/??/*/part.json")))


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_killed_and_resumed_within_two_gibibytes(tmp_path: Path) -> None:
    store = simulate(tmp_path)
    job = job_file(tmp_path, store)
    home = tmp_path / "home"
    first = Watched(job, home)
    while finished(home) < 3 and first.look():
        pass
    assert first.process.poll() is None, first.process.communicate()[1][-2000:]
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait()
    kept = finished(home)
    assert 3 <= kept < 10
    second = Watched(job, home)
    while second.look():
        pass
    assert second.process.returncode == 0, second.process.communicate()[1][-2000:]
    whole = Watched(job, tmp_path / "other")
    while whole.look():
        pass
    assert whole.process.returncode == 0
    results = [next(place.glob("jobs/*/results/BIG.sscore")).read_bytes() for place in (home, tmp_path / "other")]
    assert results[0] == results[1] and results[0].count(b"\n") == SAMPLES + 1
    peak = max(first.peak, second.peak, whole.peak)
    print(f"parts kept after the kill: {kept}; most memory: {peak / 2**20:.0f} MiB")
    assert peak <= LIMIT
