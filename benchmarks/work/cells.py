"""Variable genes and components of a simulated store, in a process of its own:
`python -m benchmarks.work.cells WHAT FOLDER GENES`.

Prints CPU seconds, the most memory (MiB) and the chosen genes as JSON; ends with 3 where a peer is not installed.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.work.memory import most_mib

COMPONENTS = 50
PATIENCE_S = 240
"""CPU seconds until one is stopped (SIGXCPU)."""


def ours(folder: Path, count: int) -> list[str]:
    """The rounds of the job after the conversion, on its own output."""
    from permed_compute.spec import JobSpec
    from permed_compute.storage.matrices import MatrixStore
    from permed_compute.testing.context import run_map
    from permed_compute.workloads.omics.matrix import WORKLOAD

    spec = JobSpec(
        name="cells", workload="omics/matrix", inputs=({"name": "cells", "path": str(folder / "cells.zarr")},),
        params={"variable": count, "components": COMPONENTS},
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as place:
        outcome = run_map(WORKLOAD, spec, Path(place), threads=2)
        var = MatrixStore.find(outcome.context.out)["rna"].var
        return list(var.index[var["highly_variable"]])


def scanpy(folder: Path, count: int) -> list[str]:
    import anndata
    import numpy as np

    adata = anndata.io.read_zarr(folder / "cells.zarr" / "mod" / "rna")
    adata.X = adata.X.astype(np.float32)
    return _scanpy(adata, count)


def dask(folder: Path, count: int) -> list[str]:
    import anndata
    import numpy as np
    import zarr
    from anndata.experimental import read_elem_lazy

    group = zarr.open_group(folder / "cells.zarr" / "mod" / "rna", mode="r")
    lazy = read_elem_lazy(group["X"], chunks=(10_000, group["X"].attrs["shape"][1]))
    adata = anndata.AnnData(
        lazy.astype(np.float32), obs=anndata.io.read_elem(group["obs"]), var=anndata.io.read_elem(group["var"])
    )
    return _scanpy(adata, count)


def _scanpy(adata: Any, count: int) -> list[str]:
    try:
        import scanpy as sc
    except ImportError:
        print("scanpy is not installed (extra: bench)", file=sys.stderr)
        raise SystemExit(3) from None
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=count, flavor="seurat")
    sc.pp.pca(adata, n_comps=COMPONENTS)
    scores = adata.obsm["X_pca"]
    if hasattr(scores, "compute"):
        scores.compute()
    return list(adata.var_names[adata.var["highly_variable"]])


def main(what: str, folder: str, count: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE_S, PATIENCE_S + 10))
    genes = {"ours": ours, "scanpy": scanpy, "dask": dask}[what](Path(folder), int(count))
    used = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "cpu_s": used.ru_utime + used.ru_stime,
        "mib": most_mib(),
        "genes": hashlib.sha256("\n".join(sorted(genes)).encode()).hexdigest(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
