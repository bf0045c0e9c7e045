from __future__ import annotations

import pytest

from permed_compute.execution.failure import KINDS, REASONS, after_loss, part_again
from permed_compute.states import JobState


def lost(code: str, losses: object = None, *, progressed: bool = False, retries: int = 2):
    return after_loss(code, losses=losses, progressed=progressed, retries=retries, now=1_000_000)


@pytest.mark.parametrize("code", sorted(KINDS))
def test_each_kind_has_its_own_budget_and_says_so(code: str) -> None:
    budget = 2 if KINDS[code].retries is None else KINDS[code].retries
    losses: object = None
    pauses = []
    for number in range(1, budget + 1):
        verdict = lost(code, losses)
        assert verdict.to is JobState.QUEUED
        assert f"loss {number} of {budget}" in verdict.sentence
        assert verdict.sentence.startswith(KINDS[code].sentence)
        pauses.append(verdict.not_before - 1_000_000)
        losses = verdict.losses
    assert pauses == sorted(pauses) and all(0 < pause <= 300_000 for pause in pauses)
    verdict = lost(code, losses)
    assert (verdict.to, verdict.remedy) == (JobState.FAILED, KINDS[code].remedy)


def test_one_kind_does_not_use_up_anothers_budget() -> None:
    losses: object = None
    for _ in range(10):
        losses = lost("node-lost", losses).losses
    verdict = lost("worker-lost", losses)
    assert verdict.to is JobState.QUEUED and "loss 1 of 2" in verdict.sentence
    assert dict(verdict.losses) == {"node-lost": 10, "worker-lost": 1}


def test_progress_clears_every_budget() -> None:
    spent = {"worker-lost": 2, "node-lost": 20}
    assert lost("worker-lost", spent).to is JobState.FAILED
    verdict = lost("worker-lost", spent, progressed=True)
    assert (verdict.to, dict(verdict.losses)) == (JobState.QUEUED, {"worker-lost": 1})


def test_a_count_that_an_older_version_stored_begins_anew() -> None:
    assert dict(lost("worker-lost", 2).losses) == {"worker-lost": 1}


def test_preemption_has_words_and_no_budget() -> None:
    assert "preempted" in REASONS and "preempted" not in KINDS


def test_parts() -> None:
    assert [part_again("code-error", times, 2) for times in (1, 2, 3)] == [True, True, False]
    assert [part_again("over-memory", times, 5) for times in (1, 2)] == [True, False]
    assert not part_again("over-memory", 1, 0)
    assert not part_again("refused", 1, 5)
