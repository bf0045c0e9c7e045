"""Encoding slides with an encoder that answers at once: the whole job on Ray, beside the reader alone."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case
from benchmarks.rigs import slides
from benchmarks.rigs.home import new_home
from permed_compute.client import Client, open_client
from permed_compute.execution import records
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.workloads.pathology import features

TITLE = "Feeding encoders"
WHY = (
    "What an encoder gets to see is what blocks, ledger and Ray leave of the reader's rate. Eight slides, tiles of 256"
    " pixels at their own resolution, an encoder that answers zeros at once. The job: from the first block's start to"
    " the last one's publication, as the attempt's own records say. The reader: the same tiles (those of tissue: glass"
    " decodes faster), in the same order, in as many processes of one thread. Goal: 80 % of its rate."
)
_SIZE = 256
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def cases(quick: bool) -> list[Case]:
    edge, count = (2048, 2) if quick else (20_480, 8)
    found: list[Case] = []
    for workers in (1, 2):
        rig = _Rig(edge, count, workers)
        group = f"tiles/s, {workers} worker{'s' * (workers > 1)} of one CPU"
        found += [
            Case(group, "ours, the job on Ray", "tiles/s", "higher", rig.job, ratio=0.8, goal="≥ 80 % of the reader",
                 close=rig.close),
            Case(group, "the reader alone", "tiles/s", "higher", rig.reader, peer=True, close=rig.close),
        ]  # fmt: skip
    return found


@cache
def _slides(edge: int, count: int) -> Path:
    """A folder of slides of the same pixels and different bytes."""
    folder = tempfile.TemporaryDirectory(prefix="permed-bench-encode-")
    _KEPT.append(folder)
    for number in range(count):
        path = Path(shutil.copy(slides.slide(edge), Path(folder.name) / f"{number}.tiff"))
        with path.open("ab") as file:
            file.write(bytes([number]))
    return Path(folder.name)


class _Rig:
    """A home and its Ray, started when first needed and kept: the figure is of blocks, not of starting."""

    def __init__(self, edge: int, count: int, workers: int) -> None:
        self._edge, self._count, self._workers = edge, count, workers
        self._stack = ExitStack()
        self._client: Client | None = None
        self._runs = itertools.count()
        self._corners: np.ndarray | None = None
        """Of a slide's tiles, as the job read them."""

    def close(self) -> None:
        self._stack.close()

    def job(self) -> float:
        if self._client is None:
            self._client = self._stack.enter_context(open_client(self._stack.enter_context(new_home("ray"))))
        client = self._client
        spec = JobSpec(
            name="encode", workload="pathology/encode", inputs=(str(_slides(self._edge, self._count)),),
            params={"encoder": "noop", "size": _SIZE, "target_mpp": slides.MPP, "min_tissue": 0.0},
            seed=next(self._runs), resources={"workers": self._workers, "cpus": 1, "memory": "2GiB"},
        )  # fmt: skip
        [job] = client.wait([job.id for job in client.submit(spec)])
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"The job ended {job.state}: {job.reason}, {job.detail.get('sentence', '')}")
        paths = client.paths(job)
        result: Any = read_json(paths.results / "result.json")
        self._corners, _, _ = features.read(paths.results / min(result["values"]["features"].values()))
        rows, _ = records.read(paths.attempt(job.attempt).records())
        blocks = [row for row in rows if row["kind"] == "part" and row["name"].count("-") == 2]
        began = min(row["started"] for row in blocks) / 1000
        return float(result["values"]["tiles"]) / (max(r["started"] / 1000 + r["seconds"] for r in blocks) - began)

    def reader(self) -> float:
        if self._corners is None:
            self.job()
        paths = sorted(_slides(self._edge, self._count).iterdir())
        context = multiprocessing.get_context("spawn")
        gate = context.Barrier(self._workers)
        with context.Pool(self._workers, _gate, (gate,)) as pool:
            shares = [(paths[k :: self._workers], self._corners) for k in range(self._workers)]
            spans = pool.starmap(_read, shares, chunksize=1)
        tiles = sum(span[0] for span in spans)
        return float(tiles / (max(span[2] for span in spans) - min(span[1] for span in spans)))


_GATE: list[Any] = []


def _gate(gate: Any) -> None:
    _GATE.append(gate)


def _read(paths: list[Path], corners: np.ndarray) -> tuple[int, float, float]:
    """(tiles, begin, end) of reading these tiles of each slide, block by block."""
    from permed_compute.workloads.pathology.encode import block_size
    from permed_compute.workloads.pathology.reader import Reader
    from permed_compute.workloads.pathology.source import open_slide

    readers = [Reader(open_slide(path)) for path in paths]
    block = block_size({"block": 512, "size": _SIZE})
    pixels = np.empty((block, _SIZE, _SIZE, 3), np.uint8)
    readers[0].read_many(slides.MPP, corners[:block], _SIZE, pixels[: len(corners[:block])])
    _GATE[0].wait()
    began = time.time()
    for reader in readers:
        for first in range(0, len(corners), block):
            places = corners[first : first + block]
            reader.read_many(slides.MPP, places, _SIZE, pixels[: len(places)])
    return len(corners) * len(readers), began, time.time()
