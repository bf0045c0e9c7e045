"""The chain and its anchor: every way of tampering that we know of is named by its first record."""

from __future__ import annotations

import json
import logging
import sqlite3
import stat
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permed_compute.errors import AuditError
from permed_compute.queue import events
from permed_compute.queue.events import START, Anchor, Tip, chained, digest, verify
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Event
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.states import JobState
from permed_compute.testing.queue import a_move, a_spec

COUNT = 20
FIELDS = {
    "at": 1, "job_id": "x", "actor": "mallory", "action": "NOTED", "before": "HELD", "after": "SUCCEEDED",
    "reason": "none", "policy": "p", "data": '{"spec":"other"}',
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A closed queue of COUNT events with its anchor."""
    file = tmp_path / "home" / "queue.db"
    queue = SqlQueue(sqlite_url(file), anchor=anchor(file))
    jobs = queue.submit([a_spec(array=COUNT // 2)], owner="ada")
    queue.apply([a_move(job, JobState.HELD) for job in jobs])
    queue.close()
    return file


def anchor(file: Path) -> Anchor:
    return Anchor.of(file.parent.parent / "anchors", file.parent)


def tamper(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def first_wrong(file: Path, with_anchor: bool = True) -> int:
    """The record that the verification names."""
    queue = SqlQueue(sqlite_url(file))
    try:
        with pytest.raises(AuditError) as caught:
            verify(queue, anchor(file) if with_anchor else None)
        return caught.value.seq
    finally:
        queue.close()


def rehash(file: Path, first: int, last: int = COUNT) -> None:
    """What a thorough forger does: chain everything anew from `first` to `last`."""
    with closing(sqlite3.connect(file)) as connection:
        columns = "seq, at, job_id, actor, action, before, after, reason, policy, data, previous, hash"
        rows = connection.execute(
            f"SELECT {columns} FROM queue_events WHERE seq BETWEEN ? AND ? ORDER BY seq", (first - 1, last)
        ).fetchall()
        previous = rows[0][-1] if first > 1 else START.hash
        for row in rows if first == 1 else rows[1:]:
            event = Event(*row[:9], json.loads(row[9]), previous, "")
            connection.execute(
                "UPDATE queue_events SET previous = ?, hash = ? WHERE seq = ?", (previous, digest(event), event.seq)
            )
            previous = digest(event)
        connection.commit()


# ------------------------------------------------------------------------------------------- the chain


def test_an_untouched_log(file: Path) -> None:
    queue = SqlQueue(sqlite_url(file))
    verified = verify(queue, anchor(file))
    assert (verified.count, verified.head) == queue.head()
    assert verified.count == verified.anchored_seq == COUNT
    queue.close()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("seq", [1, 11, COUNT])
def test_an_edited_field(file: Path, field: str, seq: int) -> None:
    value = json.dumps(FIELDS[field]) if isinstance(FIELDS[field], int) else f"'{FIELDS[field]}'"
    tamper(file, f'UPDATE queue_events SET "{field}" = {value} WHERE seq = {seq}')
    assert first_wrong(file, with_anchor=False) == seq


@pytest.mark.parametrize("seq", [1, 7, COUNT - 1])
def test_an_edited_record_with_its_hash_made_to_fit(file: Path, seq: int) -> None:
    tamper(file, f"UPDATE queue_events SET actor = 'mallory' WHERE seq = {seq}")
    rehash(file, seq, seq)
    assert first_wrong(file, with_anchor=False) == seq


def test_an_edited_hash(file: Path) -> None:
    tamper(file, f"UPDATE queue_events SET hash = '{'0' * 64}' WHERE seq = 9")
    assert first_wrong(file, with_anchor=False) == 9


@pytest.mark.parametrize("seq", [1, 7, COUNT - 1])
def test_a_removed_record(file: Path, seq: int) -> None:
    tamper(file, f"DELETE FROM queue_events WHERE seq = {seq}")
    assert first_wrong(file, with_anchor=False) == seq


def test_a_removed_record_with_the_gap_closed(file: Path) -> None:
    tamper(
        file,
        "DELETE FROM queue_events WHERE seq = 7",
        "UPDATE queue_events SET seq = -(seq - 1) WHERE seq > 7",
        "UPDATE queue_events SET seq = -seq WHERE seq < 0",
    )
    assert first_wrong(file, with_anchor=False) == 7


def test_two_records_that_changed_places(file: Path) -> None:
    tamper(
        file,
        "UPDATE queue_events SET seq = -5 WHERE seq = 5",
        "UPDATE queue_events SET seq = 5 WHERE seq = 12",
        "UPDATE queue_events SET seq = 12 WHERE seq = -5",
    )
    assert first_wrong(file, with_anchor=False) == 5


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)


@given(text=st.text(max_size=20), data=st.dictionaries(st.text(max_size=20), SCALARS, max_size=5))
def test_a_record_is_canonical_json(text: str, data: dict[str, object]) -> None:
    """The hand-made text of a record is what json.dumps writes, whatever it holds."""
    import hashlib

    event = chained(
        Tip(6, "ab"), at=5, job_id=text, actor=text, action="NOTED", before=text, after="", reason=text, policy=text,
        data=data,
    )  # fmt: skip
    record = {
        "seq": 7, "at": 5, "job_id": text, "actor": text, "action": "NOTED", "before": text, "after": "",
        "reason": text, "policy": text, "data": data,
    }  # fmt: skip
    expected = "ab" + json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert event.hash == hashlib.sha256(expected.encode()).hexdigest() == digest(event)
    assert digest(replace(event, reason=text + "x")) != event.hash


# ------------------------------------------------------------------------------------------- the anchor


@pytest.mark.parametrize("left", [0, 1, COUNT - 1])
def test_a_cut_tail(file: Path, left: int) -> None:
    tamper(file, f"DELETE FROM queue_events WHERE seq > {left}")
    assert first_wrong(file) == left + 1
    queue = SqlQueue(sqlite_url(file))
    assert verify(queue).count == left  # the chain alone cannot know
    queue.close()


def test_a_chain_rewritten_to_its_end(file: Path) -> None:
    tamper(file, "UPDATE queue_events SET actor = 'mallory' WHERE seq = 3")
    rehash(file, 3)
    assert first_wrong(file) == COUNT
    queue = SqlQueue(sqlite_url(file))
    assert verify(queue).count == COUNT
    queue.close()


def test_a_cut_log_that_grew_again_keeps_contradicting(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    tamper(file, "DELETE FROM queue_events WHERE seq > 15")
    with caplog.at_level(logging.WARNING):
        queue = SqlQueue(sqlite_url(file), anchor=anchor(file))
    assert "anchor" in caplog.text
    for _ in range(10):
        queue.note("later", actor="ada", data={})
    queue.close()
    assert first_wrong(file) == COUNT


def test_somebody_can_answer_for_a_restored_log(file: Path) -> None:
    tamper(file, "DELETE FROM queue_events WHERE seq > 15")
    kept = anchor(file)
    queue = SqlQueue(sqlite_url(file), anchor=kept)
    kept.accept(queue, actor="ada", why="restored from Monday's backup")
    assert verify(queue, kept).anchored_seq == 16
    assert queue.events(after=15)[0].data == {"why": "restored from Monday's backup"}
    queue.note("later", actor="ada", data={})
    queue.close()
    assert kept.read().seq == 17


@pytest.mark.parametrize("change", [{"seq": 3}, {"hash": "0" * 64}, {"at": 0}, {"hmac": ""}, None])
def test_an_edited_anchor(file: Path, change: dict[str, object] | None) -> None:
    target = anchor(file).file
    row = json.loads(target.read_text())
    target.write_text("{}" if change is None else json.dumps(row | change))
    assert first_wrong(file) == 0


def test_a_removed_anchor(file: Path) -> None:
    anchor(file).file.unlink()
    assert first_wrong(file) == 0


def test_a_removed_key(file: Path) -> None:
    anchor(file).key_file.unlink()
    assert first_wrong(file) == 0


def test_the_key_is_private_and_outside_the_home(file: Path) -> None:
    kept = anchor(file)
    assert stat.S_IMODE(kept.key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert not kept.folder.is_relative_to(file.parent)
    assert kept.folder != Anchor.of(kept.folder.parent, file.parent / "other").folder


def test_without_an_anchor_yet(tmp_path: Path) -> None:
    queue = MemoryQueue()
    queue.note("n", actor="ada", data={})
    assert verify(queue, Anchor(tmp_path / "none")).anchored_seq == 0
    assert not (tmp_path / "none").exists()


def test_the_anchor_follows_while_the_queue_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "INTERVAL", 0.01)
    kept = Anchor(tmp_path / "anchor")
    queue = SqlQueue(sqlite_url(tmp_path / "queue.db"), anchor=kept)
    for count in (1, 2, 3):
        queue.note("n", actor="ada", data={})
        deadline = time.monotonic() + 60
        while (mark := kept.read()) is None or mark.seq < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    queue.close()


def test_an_anchor_whose_first_writing_was_interrupted(tmp_path: Path) -> None:
    kept = Anchor(tmp_path / "anchor")
    kept._create()
    queue = SqlQueue(sqlite_url(tmp_path / "queue.db"))
    queue.note("n", actor="ada", data={})
    assert verify(queue, kept).anchored_seq == 0
    queue.close()
    SqlQueue(sqlite_url(tmp_path / "queue.db"), anchor=kept).close()
    assert kept.read().seq == 1


def test_an_anchor_serves_one_queue_after_the_other(tmp_path: Path) -> None:
    kept = Anchor(tmp_path / "anchor")
    for count in (1, 2, 3):
        queue = SqlQueue(sqlite_url(tmp_path / "queue.db"), anchor=kept)
        queue.note("n", actor="ada", data={})
        queue.close()
        assert kept.read().seq == count


def test_a_busy_queue_writes_its_anchor_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "INTERVAL", 3600.0)
    written: list[Path] = []
    write: Callable[[Path, object], None] = events.write_json
    monkeypatch.setattr(events, "write_json", lambda path, row: (written.append(path), write(path, row)))
    kept = Anchor(tmp_path / "anchor")
    queue = SqlQueue(sqlite_url(tmp_path / "queue.db"), anchor=kept)
    for _ in range(50):
        queue.note("n", actor="ada", data={})
    queue.close()
    assert len(written) <= 3  # its creation, at most once meanwhile, and once at the end
    assert kept.read().seq == 50
