from __future__ import annotations

import pytest

from permed_compute.errors import StateError
from permed_compute.states import ALLOWED, ENDED, LIVE, WAITING, JobState, check_move


def test_the_table_covers_every_state_once() -> None:
    assert set(ALLOWED) == set(JobState) == WAITING | LIVE | ENDED
    assert not (WAITING & LIVE or LIVE & ENDED or WAITING & ENDED)


def test_every_state_can_be_reached_and_every_live_one_left() -> None:
    reached, todo = {JobState.QUEUED}, [JobState.QUEUED]
    while todo:
        for after in ALLOWED[todo.pop()] - reached:
            reached.add(after)
            todo.append(after)
    assert reached == set(JobState)
    for state in LIVE:
        assert ALLOWED[state] & (ENDED | WAITING | LIVE)


def test_success_is_final_and_a_refused_move_says_what_is_allowed() -> None:
    assert not ALLOWED[JobState.SUCCEEDED]
    with pytest.raises(StateError, match="From QUEUED it can become CANCELLED, FAILED, HELD, QUEUED, RESERVED"):
        check_move(JobState.QUEUED, JobState.RUNNING)
