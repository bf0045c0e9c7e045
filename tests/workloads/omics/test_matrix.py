"""Matrices: every format into one store, what scanpy finds in memory found in blocks, and what is refused."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from permed_compute.errors import RefusedInput, SpecError, WorkloadError
from permed_compute.storage.matrices import MatrixStore

from .made import job, named


def cells(rows=900, features=240, seed=0):
    """Counts of three kinds of cells, some genes mitochondrial, one seen nowhere."""
    rng = np.random.default_rng(seed)
    kinds = rng.lognormal(-1.0, 1.2, (3, features))
    mean = kinds[rng.integers(0, 3, rows)] * rng.lognormal(0, 0.4, (rows, 1))
    matrix = rng.poisson(mean)
    matrix[:, features // 2] = 0
    names = [f"MT-{k}" if k < 6 else f"G{k}" for k in range(features)]
    kind = pd.Categorical(rng.choice(["a", "b"], rows))
    index = [f"cell-{k}" for k in range(rows)]
    obs = pd.DataFrame({"louvain": kind, "who": [f"d{k % 5}" for k in range(rows)]}, index=index)
    return anndata.AnnData(sparse.csr_matrix(matrix.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))


def made(root, *inputs, **params):
    outcome = job("omics/matrix", root, list(inputs), **{"block": 250, **params})
    assert not outcome.failures, outcome.failures
    return MatrixStore.find(outcome.context.out), outcome


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """(the AnnData, its store, the outcome): filtered, 60 variable genes, 8 components, in parts of 250 rows."""
    root, adata = tmp_path_factory.mktemp("matrix"), cells()
    adata.write_h5ad(root / "cells.h5ad")
    return adata, *made(root / "w", named("rna", root / "cells.h5ad"), variable=60, components=8, min_features=60,
                        obs=["louvain"], subject="who")  # fmt: skip


def same_up_to_sign(ours, theirs, tolerance):
    signs = np.sign((ours * theirs).sum(axis=0))
    assert np.abs(ours * signs - theirs).max() < tolerance * np.abs(theirs).max()


# ------------------------------------------------------------------------------------------------ scanpy


def scanpys(adata, *, count, components, target=1e4, logged=False):
    sc = pytest.importorskip("scanpy", reason="scanpy is not installed (extra: dev)")
    adata.var["mt"] = adata.var_names.str.startswith("MT-")
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
    sc.pp.filter_genes(adata, min_cells=1)
    if not logged:
        sc.pp.normalize_total(adata, target_sum=target)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=count, flavor="seurat")
    sc.pp.pca(adata, n_comps=components, svd_solver="arpack", dtype="float64")
    return adata


def agrees(store, adata, rows):
    """QC exact; dispersions to 1e-4; the same genes; components to 1e-3 of the largest score, variances to 1e-5."""
    rna = store["rna"]
    obs, var = rna.obs[rows], rna.var[rna.var["kept"]]
    assert list(var.index) == list(adata.var_names)
    for ours, theirs in {"n_genes_by_counts": "n_genes_by_counts", "total_counts": "total_counts",
                         "pct_counts_mt": "pct_counts_mt"}.items():  # fmt: skip
        assert obs[ours].to_numpy() == pytest.approx(adata.obs[theirs].to_numpy(), rel=1e-5)
    for name, tolerance in {"means": 1e-4, "dispersions": 1e-4, "dispersions_norm": 1e-3}.items():
        assert var[name].to_numpy() == pytest.approx(adata.var[name].to_numpy(), rel=tolerance, abs=1e-6, nan_ok=True)
    assert (var["highly_variable"].to_numpy() == adata.var["highly_variable"].to_numpy()).all()
    pca = rna.uns["pca"]
    assert pca["variance"] == pytest.approx(adata.uns["pca"]["variance"], rel=1e-5)
    assert pca["variance_ratio"] == pytest.approx(adata.uns["pca"]["variance_ratio"], rel=1e-5)
    same_up_to_sign(rna.obsm("X_pca")[rows], adata.obsm["X_pca"], 1e-3)
    same_up_to_sign(rna.varm("PCs")[rna.var["kept"].to_numpy()], adata.varm["PCs"], 1e-3)


def test_counts_as_scanpy_in_memory(counted):
    adata, store, _ = counted
    rows = store["rna"].obs["kept"].to_numpy()
    assert 0 < rows.sum() < len(rows)
    agrees(store, scanpys(adata[rows].copy(), count=60, components=8), rows)


def test_pbmc68k_as_scanpy_in_memory(tmp_path):
    """Its raw matrix: log-normalised values of 700 cells."""
    sc = pytest.importorskip("scanpy", reason="scanpy is not installed (extra: dev)")
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    adata.write_h5ad(tmp_path / "pbmc.h5ad")
    store, outcome = made(tmp_path / "w", named("rna", tmp_path / "pbmc.h5ad"), variable=200, components=20)
    assert outcome.result.values["modalities"]["rna"]["kind"] == "log"
    del adata.uns
    agrees(store, scanpys(adata, count=200, components=20, logged=True), np.ones(adata.n_obs, bool))


# ------------------------------------------------------------------------------------------------ the store


def test_what_the_store_holds(counted):
    adata, store, outcome = counted
    rna = store["rna"]
    pseudonym = outcome.context.pseudonym
    assert list(rna.obs.index) == [pseudonym(name) for name in adata.obs_names]
    assert list(rna.obs["subject"]) == [pseudonym(name) for name in adata.obs["who"]]
    assert list(rna.obs["louvain"]) == list(adata.obs["louvain"]) and "who" not in rna.obs
    assert rna.rows.dtype == np.uint16 and rna.rows.indices.dtype == np.uint16
    for a, b in [(0, 900), (3, 4), (895, 900), (5, 5)]:
        assert (rna.rows.read(a, b) != adata.X[a:b]).nnz == 0
    lost = ~rna.obs["kept"].to_numpy()
    assert np.isnan(rna.obsm("X_pca")[lost]).all() and np.isfinite(rna.obsm("X_pca")[~lost]).all()


def test_anndata_reads_it(counted):
    adata, store, _ = counted
    read = anndata.io.read_zarr(store.root / "mod" / "rna")
    assert (read.X != adata.X).nnz == 0 and read.obsm["X_pca"].shape == (900, 8)
    assert read.uns["permed"]["kind"] == "counts"


@pytest.fixture(scope="module")
def cll(shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("cll")
    return made(root, named("cll", shared_data / "omics" / "cll.h5mu"), variable=500, components=5)


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore:From 0.4")
def test_mudata_reads_it(cll):
    mudata = pytest.importorskip("mudata", reason="mudata is not installed (extra: dev)")
    store, _ = cll
    read = mudata.read_zarr(store.root)
    assert set(read.mod) == {"Drugs", "Methylation", "Mutations", "mRNA"} and read.n_obs == 200


@pytest.mark.shared
def test_cll_as_scikit_learn(cll):
    """Four modalities of 200 people, each of another set of them; what is missing stands for the mean."""
    from sklearn.decomposition import PCA

    store, outcome = cll
    given = outcome.result.values["modalities"]
    assert {name: (one["rows"], one["features"]) for name, one in given.items()} == {
        "Drugs": (184, 310), "Methylation": (196, 4248), "Mutations": (200, 69), "mRNA": (136, 5000),
    }  # fmt: skip
    for name in store.names:
        one = store[name]
        values = one.rows.read(0, one.rows.shape[0])[:, one.var["highly_variable"].to_numpy()].astype(np.float64)
        values = np.where(np.isnan(values), np.nanmean(values, axis=0), values)
        pca = PCA(5, svd_solver="full").fit(values)
        assert one.uns["pca"]["variance"] == pytest.approx(pca.explained_variance_, rel=1e-4)
        same_up_to_sign(one.obsm("X_pca"), pca.transform(values), 1e-3)


# ------------------------------------------------------------------------------------------------ tables


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(30, 12)).round(4)
    values[2, 3] = np.nan
    return pd.DataFrame(values, index=[f"person{k}" for k in range(30)], columns=[f"cg{k}" for k in range(12)])


@pytest.mark.parametrize("end", ["tsv", "csv", "tsv.gz", "parquet"])
@pytest.mark.parametrize("orientation", ["samples", "features"])
def test_tables_either_way_round(table, tmp_path, monkeypatch, end, orientation):
    monkeypatch.setattr("permed_compute.workloads.omics.matrices._TEXT_BYTES", 700)  # several chunks
    given = table if orientation == "samples" else table.T
    path = tmp_path / f"m.{end}"
    if end == "parquet":
        given.reset_index(names="id").to_parquet(path)
    else:
        given.to_csv(path, sep="," if end == "csv" else "\t", na_rep="NA")
    store, outcome = made(tmp_path / "w", named("methylation", path), orientation=orientation, components=3)
    one = store["methylation"]
    assert list(one.obs.index) == [outcome.context.pseudonym(name) for name in table.index]
    assert list(one.var.index) == list(table.columns)
    assert np.array_equal(one.rows.read(0, 30), table.to_numpy(np.float32), equal_nan=True)
    assert one.obs["n_observed"].tolist() == table.notna().sum(axis=1).tolist()


def refused(tmp_path, path, **params):
    outcome = None
    with pytest.raises((RefusedInput, WorkloadError)) as error:
        outcome = job("omics/matrix", tmp_path / "w", [named("m", path)], components=0, **params)
        assert not outcome.failures
    said = str(error.value)
    assert "person" not in said.replace("person's", ""), said
    return said


def text(tmp_path, table, name="m.tsv"):
    table.to_csv(tmp_path / name, sep="\t", na_rep="NA")
    return tmp_path / name


def test_bad_tables_are_refused_by_pseudonym(table, tmp_path):
    from permed_compute.testing.context import LocalContext

    pseudonym = LocalContext.pseudonym(None, "person4")[:12]
    twice = table.rename(index={"person9": "person4"})
    said = refused(tmp_path, text(tmp_path, twice))
    assert "DUPLICATE_SAMPLES" in said and "Row 10" in said and pseudonym in said
    words = table.astype(object)
    words.iloc[4, 7] = "high"
    for given, orientation in ((words, "samples"), (words.T, "features")):
        said = refused(tmp_path, text(tmp_path, given), orientation=orientation)
        assert "NOT_A_NUMBER" in said and pseudonym in said and "high" not in said
        assert ("Row 6, column 9" if orientation == "samples" else "Row 9, column 6") in said
    infinite = table.copy()
    infinite.iloc[4, 7] = np.inf
    assert "NOT_A_NUMBER" in refused(tmp_path, text(tmp_path, infinite))
    assert "EMPTY_MODALITY" in refused(tmp_path, text(tmp_path, table.iloc[:0]))
    assert "EMPTY_MODALITY" in refused(tmp_path, text(tmp_path, table * np.nan))
    assert "DUPLICATE_FEATURES" in refused(tmp_path, text(tmp_path, table.rename(columns={"cg1": "cg0"})))
    ragged = text(tmp_path, table)
    ragged.write_text(ragged.read_text().replace("person7\t", "person7\t1\t"))
    assert "MATRIX_UNREADABLE" in refused(tmp_path, ragged)


def test_bad_anndata_are_refused(tmp_path):
    import h5py

    path = tmp_path / "m.h5ad"
    adata = cells(50, 20)
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:  # obs says fewer rows than the matrix has
        del file["obs/_index"]
        file["obs/_index"] = np.array([f"c{k}" for k in range(49)], object)
    assert "MATRIX" in refused(tmp_path, path)
    adata.X = adata.X.tocsc()
    adata.write_h5ad(path)
    assert "BY_COLUMN" in refused(tmp_path, path)
    adata.X = sparse.csr_matrix(adata.X)
    adata.X.data[0] = -1
    adata.write_h5ad(path)
    assert "NOT_A_NUMBER" in refused(tmp_path, path)
    assert "NOT_A_NUMBER" not in refused(tmp_path, path, obs=["age"])
    assert "COLUMN_ABSENT" in refused(tmp_path, path, obs=["age"])
    path.write_bytes(b"no HDF5")
    assert "MATRIX_UNREADABLE" in refused(tmp_path, path)


def test_who_has_nothing_is_noted(table, tmp_path):
    table = table.copy()
    table.iloc[4] = np.nan
    _, outcome = made(tmp_path / "w", named("m", text(tmp_path, table)), components=3)
    (finding,) = outcome.context.findings
    assert finding.code == "ALL_MISSING" and finding.numbers == {"rows": 1}
    assert outcome.context.pseudonym("person4")[:12] in finding.sentence and "row 5 " in finding.sentence


def test_values_that_do_not_fit_are_float32(tmp_path):
    adata = cells(40, 20)
    adata.X = adata.X.astype(np.float64)
    adata.X.data[-1] = 1e6
    adata.write_h5ad(tmp_path / "a.h5ad")
    store, _ = made(tmp_path / "a", named("rna", tmp_path / "a.h5ad"), components=0)
    assert store["rna"].rows.dtype == np.uint32
    adata.X.data[-1] = 0.5
    adata.write_h5ad(tmp_path / "b.h5ad")
    store, outcome = made(tmp_path / "b", named("rna", tmp_path / "b.h5ad"), components=0, kinds={"rna": "counts"})
    assert store["rna"].rows.dtype == np.float32
    assert outcome.result.values["modalities"]["rna"]["kind"] == "counts"


@pytest.mark.parametrize("params", [{"kinds": {"rna": "x"}}, {"kinds": {"dna": "log"}}, {"target": 0}, {"nonsense": 1}])
def test_wrong_params(tmp_path, params):
    cells(20, 10).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(SpecError):
        made(tmp_path / "w", named("rna", tmp_path / "a.h5ad"), **params)
