from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from permed_compute.errors import StaleError
from permed_compute.storage import checkpoints
from permed_compute.storage.checkpoints import Keep, Part


def nothing() -> None: ...


def save(state: Path, number: int, *, world: int = 1, attempt: int = 1, keep: Keep | None = None) -> None:
    def one(rank: int) -> None:
        part = Part(state, number, attempt, rank, world)
        checkpoints.save(part, lambda f: (f / "x").write_text(f"{number} {rank}"), fence=nothing, keep=keep)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_all_ranks_parts_are_published_together(tmp_path: Path) -> None:
    first = Part(tmp_path, 1, 1, 0, 2)
    ranks = threading.Thread(
        target=checkpoints.save, args=(first, lambda f: (f / "x").write_text("0")), kwargs={"fence": nothing}
    )
    ranks.start()
    time.sleep(0.2)
    assert checkpoints.newest(tmp_path) is None  # one rank's part is no checkpoint
    checkpoints.save(Part(tmp_path, 1, 1, 1, 2), lambda f: (f / "x").write_text("1"), fence=nothing)
    ranks.join(120)
    found = checkpoints.newest(tmp_path)
    assert found is not None and checkpoints.world_of(found) == 2
    assert [(found / f"rank-{rank}" / "x").read_text() for rank in (0, 1)] == ["0", "1"]
    assert sorted(path.name for path in found.iterdir()) == ["checkpoint.json", "rank-0", "rank-1"]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "record"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "checkpoint-000002" / "rank-0" / "x"
    if damage == "changed":
        file.write_text("3 0")
    elif damage == "cut":
        file.write_text("")
    elif damage == "gone":
        file.unlink()
    else:
        (file.parent.parent / "checkpoint.json").write_text("{")
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-000001"


def test_ranks_share_the_looking(tmp_path: Path) -> None:
    save(tmp_path, 1, world=4)
    folder = tmp_path / "checkpoint-000001"
    (folder / "rank-2" / "x").write_text("damaged")
    assert [checkpoints.whole(folder, (rank, 4)) for rank in range(4)] == [True, True, False, True]


def test_what_is_kept(tmp_path: Path) -> None:
    for number in range(1, 8):
        save(tmp_path, number, keep=Keep(newest=2, every=3))
    assert checkpoints.names(tmp_path) == [f"checkpoint-00000{n}" for n in (7, 6, 3)]
    assert checkpoints.written_at(tmp_path) > 0


def test_an_attempt_that_was_superseded_never_publishes(tmp_path: Path) -> None:
    def superseded() -> None:
        raise StaleError("by a newer one")

    part = Part(tmp_path, 1, 1, 0, 2)  # it would wait for rank 1 for ever
    with pytest.raises(StaleError):
        checkpoints.save(part, lambda f: (f / "x").write_text("0"), fence=superseded)
    assert checkpoints.names(tmp_path) == []
    save(tmp_path, 1, attempt=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]  # what it left is swept away
    with pytest.raises(StaleError):
        save_again = Part(tmp_path, 1, 3, 0, 1)
        checkpoints.save(save_again, lambda f: (f / "x").write_text("0"), fence=nothing)
