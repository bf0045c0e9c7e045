"""Keeping a home well: backup, restore, audit, gc, doctor, catalogue."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from pathlib import Path

from permed_compute.cli import checks
from permed_compute.cli.exits import Exit
from permed_compute.paths import HomePaths
from permed_compute.settings import resolve

# ------------------------------------------------------------------------------------------- backup and audit


def test_a_backup_restores_into_another_home(permed, job_file: Path, tmp_path: Path) -> None:
    [job] = permed("submit", job_file, "--json").json
    copy = tmp_path / "queue.backup"
    assert permed("backup", copy).code == Exit.OK
    assert permed("backup", copy).code == Exit.UNAVAILABLE
    other = tmp_path / "other"
    assert permed("restore", copy, "--home", other).code == Exit.OK
    assert permed("jobs", "--json", "--home", other).json[0]["id"] == job["id"]
    assert permed("restore", copy).code == Exit.UNAVAILABLE


def test_audit_names_the_first_edited_record(permed, job_file: Path, home: HomePaths) -> None:
    permed("submit", job_file, job_file, job_file)
    assert permed("audit", "verify", "--json").json["count"] == 3
    with sqlite3.connect(home.database) as database:
        database.execute("UPDATE queue_events SET actor = 'somebody' WHERE seq = 2")
    answer = permed("audit", "verify")
    assert answer.code == Exit.FAILED
    assert "Event 2" in answer.err


def test_a_restored_log_is_accepted_by_name(permed, job_file: Path, home: HomePaths, tmp_path: Path) -> None:
    permed("submit", job_file)
    permed("backup", tmp_path / "early")
    permed("submit", job_file)
    for file in home.root.glob("queue.db*"):
        file.unlink()
    permed("restore", tmp_path / "early")
    assert permed("audit", "verify").code == Exit.FAILED
    assert permed("audit", "accept", "--why", "the disk failed").code == Exit.OK
    assert permed("audit", "verify").code == Exit.OK


# ------------------------------------------------------------------------------------------- gc


def test_gc_removes_old_results_and_keeps_the_ledger(permed, job_file: Path, home: HomePaths) -> None:
    [job] = permed("run", job_file, "--json").json["jobs"]
    assert permed("gc", "--json").json["removed"] == []
    assert len(permed("gc", "--older-than", "0s", "--dry-run", "--json").json["removed"]) == 1
    assert home.job(job["id"]).results.is_dir()
    permed("gc", "--older-than", "0s")
    assert not home.job(job["id"]).root.exists()
    assert permed("results", job["id"]).code == Exit.NOT_FOUND
    assert permed("run", job_file, "--json").json["jobs"][0]["detail"]["counts"] == {"REUSED": 5}


def test_gc_of_the_ledger_is_asked_for(permed, job_file: Path) -> None:
    permed("run", job_file)
    permed("gc", "--older-than", "0s", "--ledger")
    assert permed("run", job_file, "--json").json["jobs"][0]["detail"]["counts"] == {"DONE": 5}


def test_gc_leaves_what_waits_or_runs(permed, job_file: Path, home: HomePaths) -> None:
    [job] = permed("submit", job_file, "--json").json
    home.job(job["id"]).results.mkdir(parents=True)
    assert permed("gc", "--older-than", "0s", "--json").json["removed"] == []


def test_gc_of_received_sets_is_asked_for_and_spares_those_in_use(permed, job_file: Path, home: HomePaths) -> None:
    for name in ("one", "two"):
        there = job_file.parent / name
        there.mkdir()
        sent = job_file.parent / f"{name}.txt"
        sent.write_text(name)
        permed("send", sent, there)
        assert permed("receive", there, "--unsigned", "--name", name).code == Exit.OK
    permed("submit", job_file, "--input", "transfer:one", "--hold")
    said = permed("gc", "--json").json
    assert said["received"] == {"sets": 2, "bytes": 6} and said["removed"] == []
    assert "2 received sets of 6 B kept" in permed("gc").out
    assert permed("gc", "--received", "1d", "--json").json["removed"] == []
    [removed] = permed("gc", "--received", "0s", "--json").json["removed"]
    assert removed["what"] == "received sets" and not Path(removed["path"]).exists()
    assert [path.read_text() for path in home.received.glob("*/*")] == ["one"]
    assert permed("gc", "--json").json["received"]["sets"] == 1
    assert permed("submit", job_file, "--input", "transfer:two", "--json").json[0]["reason"] == "transfer"


def test_gc_wants_units(permed) -> None:
    answer = permed("gc", "--older-than", "30")
    assert answer.code == Exit.USAGE
    assert "write it with units" in answer.err


# ------------------------------------------------------------------------------------------- doctor


def levels(answer) -> dict[str, str]:
    return {check["name"]: check["level"] for check in answer.json["checks"]}


def test_doctor_shows_where_settings_come_from(permed) -> None:
    rows = {row["name"]: row["source"] for row in permed("doctor", "--json", "--preset", "one-gpu").json["settings"]}
    assert rows["executor"] == "environment PERMED_EXECUTOR"
    assert rows["preset"] == "flag"
    assert rows["gpus"] == "preset one-gpu"


def test_doctor_mends_permissions_and_a_dead_socket(permed, job_file: Path, home: HomePaths) -> None:
    permed("submit", job_file)
    home.root.chmod(0o755)
    home.runtime.mkdir(exist_ok=True, mode=0o700)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(home.socket))
    dead.close()
    before = permed("doctor", "--json")
    assert before.code == Exit.FAILED
    assert levels(before)["home"] == "bad"
    assert levels(before)["controller"] == "warn"
    mended = levels(permed("doctor", "--mend", "--json"))
    assert mended["home"] == mended["controller"] == "mended"
    after = permed("doctor", "--json")
    assert after.code == Exit.OK
    assert levels(after)["home"] == levels(after)["controller"] == "ok"
    assert home.root.stat().st_mode & 0o777 == 0o700


def test_doctor_mends_what_crashes_left(permed, job_file: Path, home: HomePaths) -> None:
    [job] = permed("run", job_file, "--json").json["jobs"]
    scratch = home.job(job["id"]).attempt(1).scratch
    scratch.mkdir(exist_ok=True)
    half = next(home.ledger.glob("*/.new")) / "abc.job.1.chance"
    half.mkdir()
    os.utime(half, (time.time() - 200_000,) * 2)
    assert levels(permed("doctor", "--json"))["ledger"] == "warn"
    permed("doctor", "--mend")
    assert not half.exists()
    assert not scratch.exists()


def test_doctor_mends_a_dead_ray_session(permed, job_file: Path, home: HomePaths) -> None:
    permed("submit", job_file)
    (home.runtime / "session" / "sockets").mkdir(parents=True, mode=0o700)
    assert levels(permed("doctor", "--json"))["ray session"] == "warn"
    assert levels(permed("doctor", "--mend", "--json"))["ray session"] == "mended"
    assert not (home.runtime / "session").exists()
    assert "ray session" not in levels(permed("doctor", "--json"))


def test_doctor_refuses_an_anchor_inside_the_home(permed, home: HomePaths, monkeypatch) -> None:
    monkeypatch.setenv("PERMED_ANCHOR", str(home.root / "anchor"))
    assert levels(permed("doctor", "--json"))["audit anchor"] == "bad"


def test_doctor_refuses_network_file_systems(home: HomePaths, monkeypatch) -> None:
    monkeypatch.setattr("permed_compute.queue.mounts.filesystem", lambda path: ("/data", "lustre"))
    assert checks.file_system(resolve()).level == "bad"
    monkeypatch.setenv("PERMED_QUEUE_URL", "postgresql://queue")
    assert checks.file_system(resolve()).level == "ok"


def test_doctor_refuses_a_socket_path_that_is_too_long(home: HomePaths, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + "long" * 30)
    assert checks.socket_path(home).level == "bad"


# ------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue_has_presets_and_workloads(permed) -> None:
    found = {(row["kind"], row["name"]) for row in permed("catalog", "--json").json}
    assert {("presets", name) for name in ("cpu", "one-gpu", "shared-gpu", "multi-node")} <= found
    assert ("workloads", "radiology/brain-extraction") in found
    assert ("jobs", "radiology/brain-extraction") in found


def test_the_catalogue_knows_its_kinds(permed) -> None:
    answer = permed("catalog", "nonsense")
    assert answer.code == Exit.NOT_FOUND
    assert "presets" in answer.err


def test_every_shipped_job_is_valid(permed) -> None:
    for row in permed("catalog", "jobs", "--json").json:
        assert row["title"][:1].isalpha() and len(row["title"]) < 120, row
        assert permed("validate", row["name"]).code == Exit.OK, row["name"]


def test_a_near_name_is_offered(permed) -> None:
    assert "radiology/brain-extraction" in permed("submit", "radiology/brain-extrction").err
