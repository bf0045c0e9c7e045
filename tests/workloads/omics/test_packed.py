"""Every kernel beside the loop that it replaces."""

from __future__ import annotations

import numpy as np
import pytest

from permed_compute.workloads.omics import packed as bits

from .made import codes, genotypes


@pytest.mark.parametrize("samples", [1, 3, 4, 33, 101])
def test_packing_and_unpacking_is_the_identity(samples):
    copies = genotypes(20, samples)
    packed = bits.pack(copies)
    assert packed.shape == (20, -(-samples // 4))
    assert (bits.unpack(packed, samples) == copies).all()
    assert (bits.counts(packed, samples) == codes(copies)).all()


def test_counts_of_some_samples(samples=101):
    copies, rng = genotypes(50, samples), np.random.default_rng(1)
    chosen = rng.random(samples) < 0.4
    assert (bits.counts_of(bits.pack(copies), chosen) == codes(copies[:, chosen])).all()
    where = np.flatnonzero(chosen)[::-1]
    assert (bits.unpack(bits.take_samples(bits.pack(copies), where), len(where)) == copies[:, where]).all()


@pytest.mark.parametrize("variants", [1, 5, 64, 203])
def test_score_is_the_weighted_sum(variants):
    copies, rng = genotypes(variants, 37), np.random.default_rng(2)
    weight, absent = rng.normal(size=(2, variants, 3))
    naive = np.where(copies == 3, 0, copies).T @ weight + (copies == 3).T @ absent
    assert bits.score(bits.pack(copies), weight, absent, 37) == pytest.approx(naive, abs=2e-4)


def test_a_score_of_whole_numbers_is_exact():
    copies = genotypes(5000, 37)
    ones, none = np.ones((5000, 1)), np.zeros((5000, 1))
    found = bits.score(bits.pack(copies), np.hstack([ones, none]), np.hstack([none, ones]), 37)
    assert (found[:, 0] == np.where(copies == 3, 0, copies).sum(axis=0)).all()
    assert (found[:, 1] == (copies == 3).sum(axis=0)).all()


def test_sums_over_missing_calls():
    copies, rng = genotypes(40, 37, missing=0.3), np.random.default_rng(3)
    columns, design, packed = rng.normal(size=(40, 2)), rng.normal(size=(37, 3)), bits.pack(copies)
    lost = (copies == 3).astype(float)
    assert bits.scatter(bits.split(packed, 37)[1], columns, 37) == pytest.approx(lost.T @ columns)
    assert bits.gather(bits.split(packed, 37)[1], design) == pytest.approx(lost @ design)
    het, missing = bits.sample_counts(packed, 37)
    assert (het == (copies == 1).sum(axis=0)).all() and (missing == (copies == 3).sum(axis=0)).all()


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 37, 101])
def test_planes_turned_or_not(samples):
    copies = genotypes(40, samples, missing=0.2)
    turn = np.arange(40) % 2 == 0
    called, missing = bits.split(bits.pack(copies), samples, turn)
    wanted = np.where(copies == 3, 0, np.where(turn[:, None], 2 - copies, copies))
    wide = 4 * called.shape[1]
    assert (bits.unpack(called, wide) == np.pad(wanted, ((0, 0), (0, wide - samples)))).all()
    assert (bits.unpack(missing, samples) == (copies == 3)).all()
    columns, design = np.random.default_rng(0).normal(size=(40, 3)), np.random.default_rng(1).normal(size=(samples, 2))
    assert bits.scatter(called, columns, samples) == pytest.approx(wanted.T @ columns)
    assert bits.gather(called, design) == pytest.approx(wanted @ design)


def test_alleles_half_missing_haploid_and_others():
    calls = np.array([[[0, 1], [2, 2], [-1, 1], [1, -2], [0, -2], [2, 1]]], np.int8)
    assert bits.unpack(bits.pack_alleles(calls, np.array([1])), 6).tolist() == [[1, 0, 3, 2, 0, 1]]
    assert bits.unpack(bits.pack_alleles(calls, np.array([2])), 6).tolist() == [[0, 2, 3, 0, 0, 1]]
