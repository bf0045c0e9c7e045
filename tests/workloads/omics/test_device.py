"""Products on a torch device beside the compiled kernels: on the CPU always, on CUDA where there is one."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from permed_compute.workloads.omics import association, device, gwas, prs
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.association import LinearNull, LogisticNull
from permed_compute.workloads.omics.scores import Weights

from .made import genotypes, store_of, write_bed

EVERYWHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=EVERYWHERE)
def place(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(device, "_TILE_BYTES", 2000)


def test_scores_are_those_of_the_kernel(place):
    copies, rng = genotypes(203, 1001, missing=0.05), np.random.default_rng(2)
    weight, absent = rng.normal(size=(2, 203, 3))
    ours = device.score(bits.pack(copies), weight, absent, 1001, place)
    assert ours == pytest.approx(bits.score(bits.pack(copies), weight, absent, 1001), abs=1e-4)


def test_products_are_sums_over_the_table(place):
    copies, rng = genotypes(50, 1001, missing=0.05), np.random.default_rng(2)
    table, right = rng.normal(size=(50, 4)), rng.normal(size=(1001, 3))
    found = device.products(bits.pack(copies), table, right, place)
    assert found == pytest.approx(table[np.arange(50)[:, None], copies] @ right, abs=1e-9)


def test_a_jobs_blocks_are_the_same(place, tmp_path, monkeypatch):
    copies, rng = genotypes(300, 203), np.random.default_rng(3)
    store, _ = store_of(write_bed(tmp_path / "in" / "a", copies), tmp_path / "c")
    shape = (300, 12)
    weights = Weights([f"s{k}" for k in range(12)], np.arange(300), rng.normal(size=shape),
                      np.tile(np.arange(300)[:, None] % 2 == 0, 12), np.ones(shape, bool))  # fmt: skip
    model = prs.scoring(store, weights)
    mine = "cpu:0" if place == "cpu" else place  # not the kernels: the same code that a GPU runs
    for missing in ("mean", "zero"):
        one, two = (prs.score_rows(model, 0, 300, missing, device=where) for where in ("cpu", mine))
        assert two[0] == pytest.approx(one[0], abs=1e-3) and (one[1] == two[1]).all()
    x, y = np.column_stack([np.ones(203), rng.normal(size=(203, 2))]), rng.normal(size=203)
    null = LinearNull.of(y, x)
    one, two = (association.linear(store.packed(0, 300), null, where) for where in ("cpu", mine))
    assert two.beta == pytest.approx(one.beta, abs=1e-5, nan_ok=True)
    assert two.se == pytest.approx(one.se, abs=1e-5, nan_ok=True)
    binary = LogisticNull.of((y > 0.5).astype(float), x)
    one, two = (association.logistic(store.packed(0, 300), binary, "spa", where) for where in ("cpu", mine))
    assert np.log10(two.p) == pytest.approx(np.log10(one.p), abs=0.02, nan_ok=True)
    analysis = gwas.Analysis(store, np.arange(203), {"": null}, "linear")
    assert (gwas.associate(analysis, 0, 300, device=mine).error == gwas.associate(analysis, 0, 300).error).all()


@pytest.mark.gpu
def test_speed_of_packed_input_on_a_gpu(monkeypatch):
    """Prints GB/s of packed bytes, from this machine's memory to sums."""
    monkeypatch.undo()
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(0)
    packed = np.frombuffer(rng.bytes(1000 * 62_500), np.uint8).reshape(1000, 62_500)
    weight, right = rng.normal(size=(1000, 32)), rng.normal(size=(250_000, 7))
    table = np.tile([0.0, 1.0, 2.0, 0.0], (1000, 1))
    for name, work in (
        ("scoring, 32 scores", lambda: device.score(packed, weight, weight, 250_000, "cuda")),
        ("association, 7 columns", lambda: device.products(packed, table, right, "cuda")),
    ):
        work()
        began = time.perf_counter()
        for _ in range(5):
            work()
        print(f"{name}: {5 * packed.nbytes / (time.perf_counter() - began) / 1e9:.2f} GB/s of packed input")
