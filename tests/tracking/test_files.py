from __future__ import annotations

import multiprocessing
from pathlib import Path

from permed_compute.errors import EngineError
from permed_compute.tracking.files import Spool, drain
from permed_compute.tracking.port import RecordRefusedError, RunRecord


def record(job_id: str = "job-1", ended_at: int = 2000, **more) -> RunRecord:
    return RunRecord(job_id, "name", "experiment", "SUCCEEDED", 1000, ended_at, **more)


class Server:
    """A tracking server that keeps what it gets; `down` and `refuses` say how it fails."""

    def __init__(self, *, down: bool = False, refuses: str = "") -> None:
        self.down, self.refuses = down, refuses
        self.got: list[RunRecord] = []
        self.asked = 0

    def send(self, record: RunRecord) -> str:
        self.asked += 1
        if self.down:
            raise EngineError("It does not answer.", remedy="Start it.")
        if record.job_id == self.refuses:
            raise RecordRefusedError("It will not have this record.")
        self.got.append(record)
        return f"run of {record.job_id}"


def test_what_is_read_back_is_what_was_put(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    whole = record(
        params={"lr": 0.1, "model": "unet"},
        metrics={"loss": [(0, 1.5, 10), (1, 0.5, 20)]},
        tags={"kind": "test"},
        artifacts=[str(tmp_path / "a.html")],
        models=({"name": "local.net", "folder": "bundle", "digest": "d", "card": "# net", "tags": {}},),
    )
    assert spool.read(spool.put(whole)) == whole


def test_the_same_end_of_a_job_is_kept_once_and_another_end_beside_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(record(ended_at=3000))
    spool.put(record(ended_at=3000))
    spool.put(record(ended_at=2000))
    assert [spool.read(entry).ended_at for entry in spool.pending()] == [2000, 3000]


def test_records_are_sent_oldest_first_and_then_gone(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), Server()
    for end in (10_000, 900, 5000):
        spool.put(record(f"job-{end}", end))
    told = drain(spool, server)
    assert [sent.ended_at for sent in server.got] == [900, 5000, 10_000]
    assert (told.sent, told.left, told.error) == (3, 0, "")
    assert told.found_at == ("run of job-900", "run of job-5000", "run of job-10000")
    assert drain(spool, server).sent == 0


def test_a_server_that_is_down_loses_nothing_is_asked_once_and_is_told_of(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), Server(down=True)
    for end in (1000, 2000, 3000):
        spool.put(record(f"job-{end}", end))
    told = drain(spool, server)
    assert (told.sent, told.left, server.asked) == (0, 3, 1)
    assert "It does not answer. Start it." in told.error
    assert "3 records wait" in told.error
    server.down = False
    assert drain(spool, server).sent == 3


def test_a_refused_record_does_not_hold_up_the_others(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), Server(refuses="job-1000")
    for end in (1000, 2000):
        spool.put(record(f"job-{end}", end))
    told = drain(spool, server)
    assert (told.sent, told.left) == (1, 1)
    assert "will not have this record" in told.error


def test_a_damaged_entry_is_named_kept_and_passed_over(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), Server()
    (tmp_path / "000000000000001-job-0.json").write_text('{"job_id": ')
    spool.put(record())
    told = drain(spool, server)
    assert (told.sent, told.left) == (1, 1)
    assert "000000000000001-job-0.json cannot be read" in told.error


def test_an_empty_spool_that_does_not_exist_yet_is_no_error(tmp_path: Path) -> None:
    assert drain(Spool(tmp_path / "none"), Server(down=True)).error == ""


def test_two_senders_at_once_send_each_record_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for end in range(1000, 1050):
        spool.put(record(f"job-{end}", end))
    sent = tmp_path / "sent"
    sent.mkdir()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    senders = [context.Process(target=_drain_all, args=(spool, sent, start, n)) for n in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(60)
        assert sender.exitcode == 0
    assert spool.pending() == []
    assert sorted(file.name.split(".")[0] for file in sent.iterdir()) == [f"job-{end}" for end in range(1000, 1050)]


class _Folder:
    """A server that marks each record it gets with the sender's number, so that a second sending shows."""

    def __init__(self, folder: Path, sender: int) -> None:
        self.folder, self.sender = folder, sender

    def send(self, record: RunRecord) -> str:
        (self.folder / f"{record.job_id}.{self.sender}").touch()
        return ""


def _drain_all(spool: Spool, sent: Path, start, sender: int) -> None:
    start.wait(30)
    while spool.pending():
        drain(spool, _Folder(sent, sender))
