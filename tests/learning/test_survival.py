"""Losses and figures against scikit-survival and torchsurv on the same risks; outcomes that are refused."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.errors import RefusedInput  # noqa: E402
from permed_compute.learning import concordance, survival  # noqa: E402
from permed_compute.learning.survival import Baseline, Bins, Outcomes  # noqa: E402
from permed_compute.workloads.pathology import networks  # noqa: E402


def people(seed: int, count: int = 120, *, ties: bool = True) -> tuple[Outcomes, np.ndarray]:
    chance = np.random.default_rng(seed)
    risk = chance.normal(size=count)
    event_at, censored_at = chance.exponential(np.exp(-risk)) * 10, chance.exponential(12, count)
    time = np.minimum(event_at, censored_at) + 0.01
    return Outcomes(np.ceil(time) if ties else time, event_at <= censored_at), risk + chance.normal(size=count)


def surv(outcomes: Outcomes) -> np.ndarray:
    return pytest.importorskip("sksurv.util").Surv.from_arrays(outcomes.event, outcomes.time)


@pytest.mark.parametrize("ties", [False, True])
def test_the_cox_loss_is_scikit_survivals(ties: bool) -> None:
    coxph = pytest.importorskip("sksurv.linear_model.coxph")
    outcomes, risk = people(0, ties=ties)
    loss = survival.cox_loss(*(torch.from_numpy(x) for x in (risk, outcomes.time, outcomes.event)))
    theirs = coxph.CoxPHOptimizer(risk[:, None], outcomes.event, outcomes.time, np.zeros(1), "efron")
    wanted = theirs.nlog_likelihood(np.ones(1)) * len(outcomes) / outcomes.event.sum()
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    shifted = survival.cox_loss(*(torch.from_numpy(x) for x in (risk + 500, outcomes.time, outcomes.event)))
    assert float(shifted) == pytest.approx(float(loss), rel=1e-4)


def test_the_cox_loss_and_its_gradient_are_torchsurvs() -> None:
    networks._allow_torchvision()  # torchsurv imports torchmetrics, and that torchvision
    cox = pytest.importorskip("torchsurv.loss.cox")
    outcomes, risk = people(0)
    event, time = torch.from_numpy(outcomes.event), torch.from_numpy(outcomes.time)
    ours, theirs = (torch.from_numpy(risk).float().requires_grad_() for _ in range(2))
    survival.cox_loss(ours, time, event).backward()
    (cox.neg_partial_log_likelihood(theirs, event, time.float(), reduction="sum") / event.sum()).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_a_batch_without_event_teaches_nothing_and_breaks_nothing() -> None:
    risk = torch.randn(4, requires_grad=True)
    survival.cox_loss(risk, torch.ones(4), torch.zeros(4, dtype=torch.bool)).backward()
    assert risk.grad is not None and not risk.grad.any()


def test_the_discrete_loss_is_least_at_the_kaplan_meier_estimate_over_the_bins() -> None:
    outcomes, _ = people(1)
    bins = Bins.fit(outcomes.time, outcomes.event, 5)
    index = bins.index(outcomes.time)
    logits = torch.zeros(bins.count, requires_grad=True, dtype=torch.float32)
    optimizer = torch.optim.LBFGS([logits], max_iter=200)
    event, place = torch.from_numpy(outcomes.event), torch.from_numpy(index)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = survival.discrete_loss(logits.expand(len(place), -1), place, event)
        loss.backward()
        return loss

    optimizer.step(closure)
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    _, wanted = nonparametric.kaplan_meier_estimator(outcomes.event, index)
    found = survival.curve(logits.detach()[None])[0].numpy()
    assert np.allclose(found, wanted, atol=2e-3)
    ours = survival.kaplan_meier(index, outcomes.event)[""]
    assert np.allclose(ours.survival, wanted)


def test_the_discrete_loss_is_the_likelihood_written_out() -> None:
    chance = np.random.default_rng(2)
    logits, index, event = chance.normal(size=(6, 4)), np.array([0, 1, 2, 3, 3, 0]), np.array([1, 0, 1, 1, 0, 0], bool)
    hazard = 1 / (1 + np.exp(-logits))
    wanted = 0.0
    for h, k, seen in zip(hazard, index, event, strict=True):
        survived = np.prod(1 - h[: k + (not seen)])
        wanted -= np.log(survived * (h[k] if seen else 1.0))
    found = survival.discrete_loss(*(torch.from_numpy(x) for x in (logits, index, event)))
    assert float(found) == pytest.approx(wanted / 6, rel=1e-5)


def test_figures_are_scikit_survivals() -> None:
    metrics = pytest.importorskip("sksurv.metrics")
    train, test = people(3)[0], people(4)
    outcomes, risk = test
    reach = outcomes.time < train.time.max()
    outcomes, risk = outcomes.of(reach), np.round(risk[reach], 1)
    times = np.array([2.0, 3.5, 5.0, 8.0])
    curve = np.exp(-np.exp(risk)[:, None] * times / 20)
    found = survival.scores(train, outcomes, risk, curve, times, seed=1, resamples=50)
    assert found["harrell_c"].value == pytest.approx(
        metrics.concordance_index_censored(outcomes.event, outcomes.time, risk)[0]
    )
    y = surv(train), surv(outcomes)
    assert found["uno_c"].value == pytest.approx(metrics.concordance_index_ipcw(*y, risk)[0])
    assert found["ibs"].value == pytest.approx(metrics.integrated_brier_score(*y, curve, times))
    for one in found.values():
        assert one.low < one.value < one.high


def test_the_interval_is_of_the_figure_itself_on_people_drawn_anew() -> None:
    metrics = pytest.importorskip("sksurv.metrics")
    outcomes, risk = people(5, 40)
    counts = concordance.draws(40, 7, 20)
    told = []
    for row in counts[1:].astype(int):
        drawn = np.repeat(np.arange(40), row)
        told.append(metrics.concordance_index_censored(outcomes.event[drawn], outcomes.time[drawn], risk[drawn])[0])
    found = survival.scores(outcomes, outcomes, risk, seed=7, resamples=20)["harrell_c"]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(told, [0.025, 0.975])))


def test_a_curve_of_a_cox_risk_is_breslows() -> None:
    coxph = pytest.importorskip("sksurv.linear_model.coxph")
    outcomes, risk = people(8)
    theirs = coxph.BreslowEstimator().fit(risk, outcomes.event, outcomes.time)
    times = np.array([1.0, 4.0, 9.0])
    wanted = np.array([function(times) for function in theirs.get_survival_function(risk[:5])])
    assert np.allclose(Baseline.fit(outcomes, risk).curve(risk[:5], times), wanted)


def test_bins_hold_as_many_events_each_and_their_ends_are_where_the_curve_is() -> None:
    outcomes, _ = people(9, 400, ties=False)
    bins = Bins.fit(outcomes.time, outcomes.event, 4)
    counts = np.bincount(bins.index(outcomes.time)[outcomes.event])
    assert bins.count == 4 and counts.max() - counts.min() <= 2
    assert bins.index(np.array([bins.edges[0]])) == 0  # (edge, edge]: who had it at an edge had not come through it
    assert Bins.fit(np.array([3.0, 3.0, 3.0]), np.ones(3, bool), 4).count == 1


def test_kaplan_meier_by_group() -> None:
    time, event = np.array([1.0, 2.0, 2.0, 3.0, 5.0]), np.array([True, True, False, True, False])
    found = survival.kaplan_meier(time, event, ["a"] * 4 + ["b"])
    assert found["a"].survival.tolist() == pytest.approx([0.75, 0.5, 0.0]) and found["a"].at_risk.tolist() == [4, 3, 1]
    assert found["b"].survival.tolist() == [1.0] and (found["a"].people, found["a"].events) == (4, 3)


def test_outcomes_that_cannot_be_learned_from_are_refused() -> None:
    good = survival.checked_outcomes(["3", 4.5], ["1", False])
    assert good.time.tolist() == [3.0, 4.5] and good.event.tolist() == [True, False]
    wrong = {
        "TIME_NEGATIVE": ([1.0, -2.0], [1, 0]), "NO_EVENT": ([1.0, 2.0], [0, 0]),
        "OUTCOME_UNREADABLE": (["1", "soon"], [1, 0]), "ONE_TIME": ([2.0, 2.0], [1, 0]),
    }  # fmt: skip
    for code, (time, event) in wrong.items():
        with pytest.raises(RefusedInput) as caught:
            survival.checked_outcomes(time, event)
        assert caught.value.finding.code == code and caught.value.remedy
    for event in (["yes", 1], ["", 1]):
        with pytest.raises(RefusedInput, match="OUTCOME_UNREADABLE"):
            survival.checked_outcomes([1.0, 2.0], event)
    assert survival.checked_classes(["b", "a", "b"]) == ("a", "b")
    with pytest.raises(RefusedInput, match="ONE_CLASS"):
        survival.checked_classes(["a", "a"])
    with pytest.raises(RefusedInput, match="LABEL_MISSING"):
        survival.checked_classes(["a", ""])


def test_two_risks_are_compared_on_the_same_draws() -> None:
    outcomes, risk = people(4)
    other = np.random.default_rng(9).normal(size=len(risk))
    told = survival.compared(outcomes, risk, other, resamples=200)
    alone = [survival.scores(outcomes, outcomes, one, resamples=200)[survival.HARRELL] for one in (risk, other)]
    assert told is not None and told.value == pytest.approx(alone[0].value - alone[1].value)
    assert told.low < told.value < told.high
    same = survival.compared(outcomes, risk, 2 * risk + 1, resamples=200)
    assert (same.value, same.low, same.high) == (0, 0, 0)
