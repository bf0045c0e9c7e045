"""Models over a matrix store: the autoencoder's bits and what it finds, and the factors that views share."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

from permed_compute.errors import RefusedInput, WorkloadError  # noqa: E402
from permed_compute.paths import read_json  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.storage.matrices import MatrixStore  # noqa: E402
from permed_compute.testing.context import StopAfter  # noqa: E402
from permed_compute.workloads.omics import factors, vae  # noqa: E402

from .made import job, named  # noqa: E402

SMALL = {"batch": 50, "block": 25, "window": 4, "epochs": 4, "hidden": 16, "latent": 3, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two kinds of cells; and values of the same cells, some missing."""
    root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    kind = rng.integers(0, 2, 400)
    counts = rng.poisson(rng.lognormal(0, 1, (2, 60))[kind]).astype(np.float32)
    counts[7] = 0  # an empty cell: left out
    from scipy import sparse

    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(index=[f"c{k}" for k in range(400)]),
                            var=pd.DataFrame(index=[f"G{k}" for k in range(60)]))  # fmt: skip
    adata.write_h5ad(root / "rna.h5ad")
    values = rng.normal(size=(400, 12)) + 3 * kind[:, None]
    values[rng.random(values.shape) < 0.1] = np.nan
    frame = pd.DataFrame(values, index=adata.obs_names, columns=[f"p{k}" for k in range(12)])
    frame.to_csv(root / "protein.tsv", sep="\t", na_rep="NA")
    outcome = job("omics/matrix", root / "w", [named("rna", root / "rna.h5ad"), named("protein", root / "protein.tsv")],
                  variable=40, components=0)  # fmt: skip
    return outcome.context.out, kind


def trained(root, place, left=0, **params):
    spec = JobSpec(
        name="vae", workload="omics/vae", inputs=(named("matrices", place),), params={**SMALL, **params}, seed=5
    )
    ctx = StopAfter(root, spec)
    ctx.left = left
    return vae.train(spec, ctx), ctx


@pytest.mark.parametrize("modality", ["rna", "protein"])
def test_the_latent_tells_the_kinds_apart(store, tmp_path, modality):
    place, kind = store
    result, ctx = trained(tmp_path, place, modality=modality, epochs=12)
    history = [row["loss"] for row in result.values["history"]]
    assert history[-1] < history[0]
    latent = pd.read_parquet(ctx.out / vae.LATENT)
    matrix = MatrixStore.find(place)[modality]
    kept = matrix.obs["kept"].to_numpy()
    assert list(latent.index) == list(matrix.obs.index[kept])
    from sklearn.linear_model import LogisticRegression

    assert LogisticRegression().fit(latent, kind[kept]).score(latent, kind[kept]) > 0.9
    about = read_json(ctx.out / vae.ABOUT)
    again = vae.network(len(about["features"]), vae.Params.of({**SMALL, "modality": modality}), about["kind"])
    again.load_state_dict(torch.load(ctx.out / vae.WEIGHTS, weights_only=True))


def test_interrupted_and_resumed_it_ends_with_the_same_bits(store, tmp_path):
    whole, _ = trained(tmp_path / "whole", store[0], modality="rna")
    stopped, _ = trained(tmp_path / "parts", store[0], left=11, modality="rna")
    assert stopped is None
    resumed, _ = trained(tmp_path / "parts", store[0], modality="rna")
    assert resumed.values["resumed_at"] == 11
    assert resumed.values["weights"] == whole.values["weights"]
    other, _ = trained(tmp_path / "other", store[0], modality="rna", beta=0.5)
    assert other.values["weights"] != whole.values["weights"]


def test_the_modality_must_be_said(store, tmp_path):
    with pytest.raises(WorkloadError, match="protein"):
        trained(tmp_path, store[0])


# ------------------------------------------------------------------------------------------------ factors


def test_factors_find_what_views_share(tmp_path):
    """Three factors behind two views; a third of the people lack one of them."""
    pytest.importorskip("mofapy2", reason="mofapy2 is not installed (extra: omics)")
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(120, 3))
    names = [f"person{k}" for k in range(120)]
    for name, width in (("a", 40), ("b", 25)):
        values = hidden @ rng.normal(size=(3, width)) + 0.5 * rng.normal(size=(120, width))
        people = names[:80] if name == "a" else names[40:]
        frame = pd.DataFrame(values, index=names, columns=[f"{name}{k}" for k in range(width)]).loc[people]
        frame.to_csv(tmp_path / f"{name}.tsv", sep="\t")
    made = job("omics/matrix", tmp_path / "m", [named(n, tmp_path / f"{n}.tsv") for n in "ab"], components=0)
    outcomes = [
        job("omics/factors", tmp_path / f"f{k}", [named("matrices", made.context.out)], factors=6, least=0.02)
        for k in range(2)
    ]
    first = outcomes[0]
    assert not first.failures
    scores = pd.read_parquet(first.context.out / factors.FACTORS)
    assert scores.shape == (120, 3)
    order = [first.context.pseudonym(name) for name in names]
    fit = np.linalg.lstsq(scores.loc[order].to_numpy(), hidden, rcond=None)[1]
    assert (fit / (hidden**2).sum(axis=0) < 0.1).all()
    explained = read_json(first.context.out / factors.EXPLAINED)
    assert set(explained) == {"a", "b"} and sum(explained["a"]) > 0.7
    weights = pd.read_parquet(first.context.out / "weights-b.parquet")
    assert weights.shape == (25, 3)
    again = pd.read_parquet(outcomes[1].context.out / factors.FACTORS)
    assert np.array_equal(again.to_numpy(), scores.to_numpy())


def test_too_much_for_factors_is_refused_before_it_starts(store, monkeypatch):
    monkeypatch.setattr(factors, "_MOST_VALUES", 1000)
    with pytest.raises(RefusedInput, match="TOO_MANY_FOR_FACTORS"):
        factors.views_of(MatrixStore.find(store[0]), ["rna", "protein"])
