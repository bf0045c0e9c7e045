"""Lesions, calibration and intervals: against MONAI where it has them, and against what a loop counts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from monai.metrics import compute_froc_curve_data, compute_froc_score  # noqa: E402
from monai.metrics.calibration import calibration_binning  # noqa: E402

from permed_compute.errors import WorkloadError  # noqa: E402
from permed_compute.workloads.radiology import calibration, statistics  # noqa: E402
from permed_compute.workloads.radiology.lesions import RATES, Detections, detect, froc  # noqa: E402

# ------------------------------------------------------------------------------------------------ lesions


def boxes(*places: tuple[int, int]) -> np.ndarray:
    """A line of boxes from … to along the first axis."""
    mask = np.zeros((40, 4, 4), bool)
    for first, after in places:
        mask[first:after, 1:3, 1:3] = True
    return mask


def test_each_lesion_is_found_once_and_the_rest_are_false() -> None:
    truth, predicted = (
        boxes((0, 4), (10, 14), (20, 24), (30, 40)),
        boxes((1, 5), (11, 12), (13, 14), (26, 28), (39, 40)),
    )
    probability = np.where(predicted, 0.5, 0.0)
    probability[13], probability[27], probability[39] = 0.9, 0.8, 0.7
    found = detect(truth, predicted, 0.1, probability, iou=0.2)
    # The lesion at 10 has two candidates: the more confident takes it, the other is a false one. At 39 only a tenth
    # of the lesion is covered.
    assert found.found == (True, True, False, False)
    assert sorted(found.hits) == [0.5, 0.9] and sorted(found.alarms) == [0.5, 0.7, 0.8]
    assert found.sizes_ml == pytest.approx((1.6, 1.6, 1.6, 4.0))


def test_a_candidate_takes_the_lesion_it_overlaps_most() -> None:
    truth = boxes((0, 2), (3, 9))
    assert detect(truth, boxes((1, 8)), 1.0).found == (False, True)


def test_small_predictions_can_be_left_out_but_small_lesions_never() -> None:
    truth = boxes((0, 1))
    assert detect(truth, truth, 1.0, least_ml=5).found == (False,)
    assert detect(truth, truth, 1.0, least_ml=5).alarms == ()


def test_the_froc_curve_is_monais() -> None:
    chance = np.random.default_rng(5)
    cases = [
        Detections((1.0,) * n, (True,) * k + (False,) * (n - k), tuple(chance.random(k)), tuple(chance.random(f)))
        for n, k, f in [(3, 2, 4), (1, 1, 0), (0, 0, 3), (4, 3, 2), (2, 0, 1)]
    ]
    told = froc(cases)
    assert told is not None and (told.lesions, told.found, told.false) == (10, 6, 10)
    hits, alarms = (np.concatenate([getattr(case, name) for case in cases]) for name in ("hits", "alarms"))
    false, sensitivity = compute_froc_curve_data(alarms, hits, 10, len(cases))
    # MONAI never counts the least confident detection of all; ours has it as the curve's last point.
    assert told.false_per_case[:-1] == pytest.approx(false[::-1])
    assert told.sensitivity[:-1] == pytest.approx(sensitivity[::-1])
    ours = (np.array(told.false_per_case)[::-1], np.array(told.sensitivity)[::-1])
    assert told.score == pytest.approx(compute_froc_score(*ours, eval_thresholds=RATES))


def test_without_any_lesion_there_is_no_curve() -> None:
    assert froc([Detections((), (), (), (0.5,))]) is None


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
