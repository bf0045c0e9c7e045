"""Jobs in the queue: validate, submit, list, explain, hold, release, cancel."""

from __future__ import annotations

from pathlib import Path

from permed_compute.cli.exits import Exit
from permed_compute.paths import HomePaths


def test_validate_names_every_problem_with_its_line(permed, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x\nworkload: radiology/brain-extraction\nrecources: {}\ntime_limit: 5\n")
    answer = permed("validate", file)
    assert answer.code == Exit.USAGE
    assert "line 3, recources" in answer.out
    assert "Did you mean resources?" in answer.out
    assert "line 4, time_limit" in answer.out


def test_validate_knows_the_workloads(permed, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x\nworkload: radiology/brain-extracton\n")
    answer = permed("validate", file, "--json")
    assert answer.code == Exit.USAGE
    assert "radiology/brain-extraction" in answer.json[0]["problems"][0]["remedy"]


def test_validate_notes_what_is_not_on_this_machine(permed, job_file: Path) -> None:
    job_file.write_text(job_file.read_text().replace("[files]", "[elsewhere]"))
    answer = permed("validate", job_file)
    assert answer.code == Exit.OK
    assert "not on this machine" in answer.out


def test_dry_run_decides_and_queues_nothing(permed, job_file: Path) -> None:
    [row] = permed("submit", job_file, "--dry-run", "--json").json
    assert row["starts_now"]
    assert row["why"] == "CPU: the job asks for no GPU."
    assert row["inputs"][0]["files"] == 5
    assert permed("jobs", "--all", "--json").json == []


def test_dry_run_says_why_it_would_wait(permed, job_file: Path) -> None:
    [row] = permed("submit", job_file, "--dry-run", "--json", "--set", "resources.cpus=64").json
    assert not row["starts_now"]
    assert row["code"] == "never-fits"
    permed("submit", job_file, "--set", "resources.cpus=2")
    [row] = permed("submit", job_file, "--dry-run", "--json", "--set", "resources.cpus=2").json
    assert not row["starts_now"]


def test_submit_queues_and_why_explains(permed, job_file: Path) -> None:
    [job] = permed("submit", job_file, "--json").json
    assert job["state"] == "QUEUED"
    assert job["spec"]["inputs"][0]["path"] == str(job_file.parent / "files")
    assert permed("why", job["id"][:12], "--json").json["code"] == "admissible"


def test_inputs_of_the_command_line_are_relative_to_the_user(
    permed, job_file: Path, monkeypatch, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    [job] = permed("submit", job_file, "--input", "other", "--input", "mask=other", "--json").json
    assert [(ref["name"], ref["path"]) for ref in job["spec"]["inputs"]] == [
        ("input", str(tmp_path / "other")), ("mask", str(tmp_path / "other")),
    ]  # fmt: skip


def test_the_second_job_that_wants_everything_waits_for_the_first(permed, job_file: Path) -> None:
    [first] = permed("submit", job_file, "--set", "resources.cpus=2", "--json").json
    [second] = permed("submit", job_file, "--set", "resources.cpus=2", "--json").json
    said = permed("why", second["id"]).out
    assert first["id"] in said
    assert "count" in said


def test_hold_release_cancel(permed, job_file: Path) -> None:
    [job] = permed("submit", job_file, "--hold", "--json").json
    assert job["state"] == "HELD"
    assert permed("release", job["id"], "--json").json[0]["state"] == "QUEUED"
    assert permed("hold", job["id"], "--json").json[0]["state"] == "HELD"
    assert permed("cancel", job["id"], "--json").json[0]["state"] == "CANCELLED"
    assert permed("release", job["id"]).code == Exit.REFUSED
    assert permed("jobs", "--json").json == []
    assert [row["id"] for row in permed("jobs", "--state", "cancelled", "--json").json] == [job["id"]]


def test_a_wrong_id_among_several_changes_nothing(permed, job_file: Path) -> None:
    [job] = permed("submit", job_file, "--json").json
    assert permed("cancel", job["id"], "00000000").code == Exit.NOT_FOUND
    assert permed("jobs", "--json").json[0]["state"] == "QUEUED"


def test_an_array_is_listed_element_by_element(permed, job_file: Path) -> None:
    rows = permed("submit", job_file, "--set", "array=3", "--json").json
    assert [row["array_index"] for row in rows] == [0, 1, 2]
    assert len(permed("jobs", "--json").json) == 3


def test_ids_are_whole_in_a_pipe(permed, job_file: Path, home: HomePaths) -> None:
    [job] = permed("submit", job_file, "--set", f"name={'n' * 90}", "--json").json
    assert job["id"] in permed("jobs").out
    assert "…" not in permed("jobs").out


def test_status_without_a_job_shows_the_machine(permed, job_file: Path) -> None:
    permed("submit", job_file)
    value = permed("status", "--json").json
    assert value["nodes"][0]["cpus"] == 2
    assert value["states"] == {"QUEUED": 1}
    assert value["controller"] == "none"
    assert "1 queued" in permed("status").out


def test_status_of_a_job_shows_its_history(permed, job_file: Path) -> None:
    [job] = permed("submit", job_file, "--json").json
    value = permed("status", job["id"], "--json").json
    assert [event["after"] for event in value["history"]] == ["QUEUED"]
    assert "submitted" in permed("status", job["id"]).out


def test_brackets_in_names_are_shown_as_they_are(permed, job_file: Path, tmp_path: Path) -> None:
    """Rich would take them for colours."""
    answer = permed("submit", job_file, "--dry-run", "--set", "resources={gpus: 1, flavors: [h100, cpu]}")
    assert "prefers [h100, cpu]" in answer.out
    folder = tmp_path / "[red]home"
    [job] = permed("run", job_file, "--home", folder, "--json").json["jobs"]
    assert str(folder) in permed("results", job["id"], "--home", folder).out
