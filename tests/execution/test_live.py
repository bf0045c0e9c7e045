"""What an attempt says of itself while it runs, and how cheaply it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from permed_compute.execution import live
from permed_compute.execution.inprocess import InProcessExecutor
from permed_compute.execution.live import Far, Meter, newest, newest_use
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths
from permed_compute.settings import Settings
from permed_compute.testing.execution import Toys, wait_for


def meter(used: dict[str, Any], far: list[Far]) -> Meter:
    return Meter(None, lambda: used, lambda: far[-1])  # type: ignore[arg-type]


def test_cores_and_rate_are_of_the_time_between_looks() -> None:
    used, far = {"cpu_s": 10.0, "rss_mib": 300}, [Far(3, 10, 0)]
    watched = meter(used, far)
    assert watched.look(100.0) == {"done": 3, "total": 10, "rate": 0.0, "cpus": 0.0, "memory": 300}
    used["cpu_s"] = 18.0
    far.append(Far(7, 10, 4))
    told = watched.look(104.0)
    assert (told["cpus"], told["rate"], told["done"]) == (2.0, 1.0, 7)


def test_the_rate_forgets_what_is_long_past() -> None:
    far = [Far(0, 100, 0)]
    watched = meter({}, far)
    watched.look(0.0)
    far.append(Far(50, 100, 50))
    watched.look(10.0)
    far.append(Far(51, 100, 51))
    assert watched.look(live._WINDOW_S + 10.0)["rate"] == pytest.approx(1 / live._WINDOW_S, rel=0.01)


def test_what_an_earlier_attempt_did_counts_to_no_rate() -> None:
    far = [Far()]
    watched = meter({}, far)
    watched.look(0.0)
    far.append(Far(142, 180, 142))
    assert watched.look(5.0)["rate"] == 0.0
    far.append(Far(152, 180, 152))
    assert watched.look(10.0)["rate"] == 2.0


def test_devices_are_taken_together_and_those_that_do_not_say_are_left_out() -> None:
    told = meter({"gpus": [{"busy": 80, "mib": 100}, {"busy": None, "mib": 50}]}, [Far()]).look(1.0)
    assert (told["gpu"], told["gpu_memory"]) == (80.0, 150)
    assert meter({"gpus": [{"busy": None, "mib": 50}]}, [Far()]).look(1.0)["gpu"] is None


def test_the_newest_record_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "records-driver.jsonl"
    assert newest(path, "use") is None
    records = Records(path)
    records.write("started")
    assert newest(path, "use") is None
    for number in range(3):
        records.write("use", number=number)
    for number in range(2000):  # far more than one block
        records.write("part", name=f"n-{number}")
    assert newest(path, "use")["number"] == 2
    assert newest(path, "part")["name"] == "n-1999"
    with path.open("ab") as file:  # a line that is being written
        file.write(b'{"t":1,"kind":"use","numb')
    assert newest(path, "use")["number"] == 2
    records.close()


def test_a_look_reads_the_end_of_a_long_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records-driver.jsonl"
    line = json.dumps({"t": 1, "kind": "part", "name": "n" * 200}, separators=(",", ":")) + "\n"
    path.write_text(line * 50_000)
    records = Records(path)
    records.write("use", done=1, total=2, rate=0.5)
    records.close()
    read: list[int] = []
    whole = Path.open

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, *words: int) -> int:
            return int(self.file.seek(*words))

        def read(self, count: int) -> bytes:
            read.append(count)
            return bytes(self.file.read(count))

    monkeypatch.setattr(Path, "open", lambda self, mode: Counting(whole(self, mode)))
    assert newest(path, "use")["done"] == 1
    assert sum(read) <= 4096


def test_a_job_tells_how_far_it_is_and_when_it_ends(
    home: HomePaths, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FIRST_S", 0.2)
    monkeypatch.setattr(live, "_EVERY_S", 0.2)
    executor = InProcessExecutor(Settings(home=str(home.root)))
    attempt = Toys(home, code, tmp_path / "tally").attempt("squares", count=30, seconds=0.1, gated=5)
    executor.launch(attempt)

    def told() -> Any:
        use = newest_use(attempt.paths)
        return use if use is not None and use.rate and use.done < use.total else None

    wait_for(told, "a rate")
    use = told() or newest_use(attempt.paths)
    assert use.total == 30 and use.memory > 10 and use.cpus is not None
    assert use.ends > use.at
    assert executor.end(attempt)


def test_a_training_tells_its_steps(home: HomePaths, code: Path, tmp_path: Path) -> None:
    attempt = Toys(home, code, tmp_path / "tally").attempt("train")
    assert live.steps_of(attempt.paths) == Far()
    records = Records(attempt.paths.records("rank-0"))
    records.write("progress", done=40, total=200)
    records.write("metric", name="loss", value=1.0, step=40)
    records.close()
    assert live.steps_of(attempt.paths) == Far(40, 200, 40)
