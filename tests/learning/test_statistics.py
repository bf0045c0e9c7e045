"""Calibration and intervals: against MONAI where it has them, and against what a loop counts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from monai.metrics.calibration import calibration_binning  # noqa: E402

from permed_compute.errors import WorkloadError  # noqa: E402
from permed_compute.learning import calibration, statistics  # noqa: E402

# ------------------------------------------------------------------------------------------------ calibration


def test_the_bins_are_monais_over_all_cases() -> None:
    chance = np.random.default_rng(2)
    p = chance.random((2, 6, 6, 6)).clip(0.02)
    y = chance.random(p.shape) < p**2
    told = calibration.summary([calibration.counts(y[k], p[k]) for k in range(len(p))])
    said, is_so, voxels = calibration_binning(
        torch.from_numpy(p).reshape(1, 1, -1), torch.from_numpy(y).reshape(1, 1, -1).double(), calibration.BINS
    )
    assert told["said"] == pytest.approx(said[0, 0].numpy()) and told["is_so"] == pytest.approx(is_so[0, 0].numpy())
    share = voxels[0, 0].numpy() / p.size
    gap = np.abs(said[0, 0].numpy() - is_so[0, 0].numpy())
    assert told["ece"] == pytest.approx((gap * share).sum()) and told["mce"] == pytest.approx(gap.max())
    assert told["brier"] == pytest.approx(((p - y) ** 2).mean())


def test_air_does_not_make_a_model_look_calibrated() -> None:
    truth, probability = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10))
    truth[0, 0], probability[0, 0] = True, 0.5
    assert calibration.summary([calibration.counts(truth, probability)])["ece"] == pytest.approx(0.5)
    assert calibration.summary([]) is None


# ------------------------------------------------------------------------------------------------ intervals


def test_the_interval_is_that_of_drawing_patients_one_by_one() -> None:
    chance = np.random.default_rng(3)
    patients = [f"p{k % 9}" for k in range(20)]
    values = chance.random(20) + [0.5 * (k % 9 < 3) for k in range(20)]
    told = statistics.mean(values.tolist(), patients)
    assert told.mean == pytest.approx(values.mean()) and (told.cases, told.patients) == (20, 9)
    names = sorted(set(patients))
    drawn = []
    for _ in range(4000):
        rows = [k for name in chance.choice(names, 9) for k in range(20) if patients[k] == name]
        drawn.append(values[rows].mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (told.low, told.high) == pytest.approx((low, high), abs=0.02)
    assert told == statistics.mean(values.tolist(), patients)


def test_scans_of_one_patient_are_no_evidence_of_their_own() -> None:
    values = [0.9, 0.5, 0.8, 0.6] * 5
    alone = statistics.mean(values, [str(k) for k in range(20)])
    shared = statistics.mean(values, [str(k % 4) for k in range(20)])
    assert shared.high - shared.low > 1.5 * (alone.high - alone.low)
    one = statistics.mean(values, ["a"] * 20)
    assert one.low is None and one.mean == pytest.approx(0.7)


def test_a_subgroup_that_is_worse_is_told_from_one_that_is_not() -> None:
    chance = np.random.default_rng(1)
    good, bad, same = (m + 0.05 * chance.normal(size=12) for m in (0.9, 0.8, 0.9))
    names = [f"a{k}" for k in range(12)], [f"b{k}" for k in range(12)]
    worse, equal = statistics.apart(bad, good, names), statistics.apart(same, good, names)
    assert worse.is_clear and worse.low < worse.mean < worse.high < 0
    assert not equal.is_clear
    assert statistics.apart([], good, ([], names[1])) is None
    assert statistics.apart(bad[:1], good, (["a"], names[1])).low is None


def test_two_models_are_compared_pair_by_pair() -> None:
    chance = np.random.default_rng(4)
    hard = chance.random(15)
    first, second = hard, hard + 0.02 + 0.005 * chance.normal(size=15)
    names = [str(k) for k in range(15)]
    told = statistics.paired(first, second, names)
    assert told.is_clear and told.p < 0.001 and told.mean == pytest.approx((second - first).mean())
    assert statistics.paired(first, first, names).p == 1.0
    with pytest.raises(WorkloadError, match="same cases"):
        statistics.paired(first, second[:3], names)
