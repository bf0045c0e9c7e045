"""Lesions found one by one: against MONAI where it has it, and against what one counts."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from monai.metrics import compute_froc_curve_data, compute_froc_score

from permed_compute.workloads.radiology.lesions import RATES, Detections, detect, froc


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
