"""120,000 cells × 5,000 genes: what scanpy finds in memory, found out of core within a bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from permed_compute.storage.matrices import MatrixStore
from tests.soak.test_omics_stream import Watched
from tests.workloads.omics.made import cells_on_disk
from tests.workloads.omics.test_matrix import agrees, scanpys

CELLS, GENES = 120_000, 5_000
LIMIT = 1280 * 2**20
"""Python and the libraries take 300 MiB of it; the matrix in scanpy's hands takes several GiB."""


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_120k_cells_as_scanpy_within_a_bound(tmp_path: Path) -> None:
    pytest.importorskip("scanpy", reason="scanpy is not installed (extra: dev)")
    import anndata

    given = cells_on_disk(tmp_path, CELLS, GENES)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: cells\nworkload: omics/matrix\ninputs:\n  - {{name: cells, path: {given}}}\n"
        "resources: {cpus: 2, memory: 2GiB}\ntime_limit: 2h\n"
    )
    run = Watched(job, tmp_path / "home")
    while run.look():
        pass
    assert run.process.returncode == 0, run.process.communicate()[1][-2000:]
    store = MatrixStore.find(next(tmp_path.glob("home/jobs/*/results")))
    print(f"most memory: {run.peak / 2**20:.0f} MiB")
    assert run.peak <= LIMIT
    adata = anndata.io.read_zarr(given / "mod" / "rna")
    adata.X = adata.X.astype(np.float32)
    agrees(store, scanpys(adata, count=2000, components=50), np.ones(CELLS, bool))
