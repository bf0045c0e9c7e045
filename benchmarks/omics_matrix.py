"""Matrices of cells out of core, beside scanpy in memory and on dask, AnnData's own reader, and scipy in memory."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, LeftOutError
from benchmarks.work.cells import PATIENCE_S

TITLE = "Matrices: training rows a second, variable genes and components"
WHY = (
    "Cells by the hundred thousand do not fit beside each other into memory, and a training that reads them one by one"
    " waits for the disk. Simulated counts (120,000 cells × 5,000 genes, about 500 a cell) in one store that all read"
    " from the disk cache. Figures are CPU seconds of all threads, because machines are shared. Goal of the loader:"
    " ≥ 100,000 cells a CPU second, block-shuffled, as CSR batches of 4,096."
    " Variable genes and components: from the store to 2,000 genes and 50 components, each in a process of its own,"
    " whose peak memory is read; all choose the same genes, which is checked. Ours is the whole job: it also converts,"
    " counts for quality control, and assembles the annotated store."
)
BATCH = 4096


def cases(quick: bool) -> list[Case]:
    rig = _Rig(*((3000, 300) if quick else (120_000, 5_000)))

    def case(group: str, name: str, measure: Callable[[], float], unit: str, better: str, **more: Any) -> Case:
        return Case(group, name, unit, better, measure, close=rig.close, **more)  # type: ignore[arg-type]

    rows, genes, memory = "training rows", "variable genes and components", "the same: most memory"
    rate = {"unit": "rows/CPU s", "better": "higher"}
    once = {"warm": lambda: 0.0, "repeats": 1}  # each is a process of its own, a minute or more
    took, held = {"unit": "CPU s", "better": "lower"}, {"unit": "MiB", "better": "lower"}
    return [
        case(rows, "ours", lambda: rig.rows(None), goal="≥ 100,000/CPU s", limit=1e5, **rate),
        case(rows, "ours, 2,000 genes, dense", lambda: rig.rows(2000), **rate),
        case(rows, "scipy, in memory, shuffled", rig.in_memory, peer=True, **rate),
        case(
            rows, "AnnData from the store, shuffled", lambda: rig.anndata(shuffled=True), peer=True, repeats=2, **rate
        ),
        case(rows, "AnnData from the store, in order", lambda: rig.anndata(shuffled=False), peer=True, **rate),
        case(genes, "ours", lambda: rig.child("ours")["cpu_s"], **took, **once),
        case(genes, "scanpy in memory", lambda: rig.child("scanpy")["cpu_s"], peer=True, **took, **once),
        case(genes, "scanpy on dask", lambda: rig.child("dask")["cpu_s"], peer=True, **took, **once),
        case(memory, "ours", lambda: rig.last("ours"), **held, **once),
        case(memory, "scanpy in memory", lambda: rig.last("scanpy"), peer=True, **held, **once),
        case(memory, "scanpy on dask", lambda: rig.last("dask"), peer=True, **held, **once),
    ]


class _Rig:
    def __init__(self, cells: int, genes: int) -> None:
        self.cells, self.genes = cells, genes
        self._last: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        folder = self.__dict__.pop("folder", None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def folder(self) -> Path:
        from tests.workloads.omics.made import cells_on_disk

        folder = Path(tempfile.mkdtemp(prefix="permed-matrix-"))
        cells_on_disk(folder, self.cells, self.genes)
        return folder

    # ----------------------------------------------------------------------------------------- rows

    def rows(self, columns: int | None) -> float:
        from permed_compute.learning.rows import Blocked, RowLoader
        from permed_compute.storage.matrices import Rows

        matrix = Rows(self.folder / "X")
        block = 256 if self.cells > BATCH else 16
        batch = min(BATCH, block * 64)
        order = Blocked(self.cells, batch, 0, block=block, window=64)
        wanted = None if columns is None else np.arange(min(columns, self.genes))
        return _rate(iter(RowLoader(matrix, order, columns=wanted, threads=2)))

    def in_memory(self) -> float:
        from permed_compute.storage.matrices import Rows

        matrix = Rows(self.folder / "X").read(0, self.cells)
        return _rate(matrix[some] for some in _shuffled(self.cells))

    def anndata(self, *, shuffled: bool) -> float:
        import zarr
        from anndata.io import sparse_dataset

        matrix = sparse_dataset(zarr.open_group(self.folder / "cells.zarr" / "mod" / "rna", mode="r")["X"])
        if not shuffled:
            return _rate(matrix[a : a + BATCH] for a in range(0, self.cells, BATCH))
        batches = [np.sort(some) for some in _shuffled(self.cells)][:2]  # at its rate a whole epoch takes minutes
        return _rate(matrix[some] for some in batches)

    # ----------------------------------------------------------------------------------------- genes

    def child(self, what: str) -> dict[str, Any]:
        """CPU seconds, MiB and the genes, out of a process of its own."""
        wanted = str(min(2000, self.genes // 3))
        words = [sys.executable, "-m", "benchmarks.work.cells", what, str(self.folder), wanted]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        if ended.returncode == -signal.SIGXCPU:
            raise LeftOutError(f"not done after {PATIENCE_S} CPU s")
        if ended.returncode == 3:
            raise LeftOutError(ended.stderr.strip().splitlines()[-1])
        if ended.returncode:
            raise RuntimeError(ended.stderr[-400:])
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        for other in self._last.values():
            if found["genes"] != other["genes"]:
                raise RuntimeError("Other genes were chosen.")
        self._last[what] = found
        return found

    def last(self, what: str) -> float:
        if what not in self._last:
            raise LeftOutError("it was not measured")
        return float(self._last[what]["mib"])


def _shuffled(count: int) -> list[np.ndarray]:
    mixed = np.random.default_rng(0).permutation(count)
    return [mixed[a : a + BATCH] for a in range(0, count, BATCH)]


def _rate(batches: Iterator[Any]) -> float:
    began, seen = time.process_time(), 0
    for batch in batches:
        seen += batch.shape[0]
    return seen / (time.process_time() - began)
