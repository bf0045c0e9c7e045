"""Which cores an attempt gets beside what runs."""

from __future__ import annotations

import pytest

from permed_compute.execution import cores

FOUR = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("taken", "asked", "expected"),
    [
        ([], [1000, 1000], {0: 1000, 1: 1000}),
        ([{0: 1000}], [2000], {1: 1000, 2: 1000}),
        ([{0: 500}], [500], {0: 500}),  # fractions fill a core that is already shared
        ([{0: 500}], [600], {1: 600}),
        ([{0: 500}], [1500], {1: 1000, 0: 500}),
        ([], [250, 250, 250, 250], {0: 1000}),
        ([{0: 1000, 1: 1000, 2: 1000, 3: 500}], [1000], {3: 1000}),  # overbooked: the emptiest
        ([{9: 1000}], [4000], {0: 1000, 1: 1000, 2: 1000, 3: 1000}),  # a core that is not ours to give
    ],
)
def test_choose(taken: list[dict[int, int]], asked: list[int], expected: dict[int, int]) -> None:
    assert cores.choose(FOUR, taken, asked) == expected


def test_attempts_that_fit_never_share_a_whole_core() -> None:
    taken: list[dict[int, int]] = []
    for asked in ([1000], [500, 500], [2000]):
        taken.append(cores.choose(FOUR, taken, asked))
    assert {core: sum(shares.get(core, 0) for shares in taken) for core in FOUR} == dict.fromkeys(FOUR, 1000)
