"""`permed send` and `permed receive`: answers, refusals with a way out, and exit codes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from permed_compute.cli.exits import Exit
from permed_compute.paths import read_json


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "Nordmann_Kari"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.dcm").write_bytes(bytes([number]) * 400_000)
    return folder


@pytest.fixture
def gate(tmp_path, home):
    """A declared filsluse with a key to sign by, and a list of signers."""
    folder = tmp_path / "gate"
    folder.mkdir()
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=30)
    home.root.mkdir(parents=True, exist_ok=True)
    home.signers.write_text(f'anna namespaces="permed-transfer" {key.with_suffix(".pub").read_text()}')
    home.destinations.write_text(
        f"destinations:\n  gate: {{kind: folder, path: {folder}, signed: true, volume: 1MiB, max_data_class: red}}\n"
        f"  kista: {{kind: sftp, direction: send, host: h, max_data_class: red}}\n"
    )
    return folder


def test_a_signed_set_through_the_gate(permed, scans, gate, tmp_path):
    sent = permed("--json", "send", scans, "gate", "--key", tmp_path / "key")
    assert sent.code == 0 and sent.json["files"] == 3 and sent.json["signed"] and len(sent.json["volumes"]) == 2
    received = permed("--json", "receive", "gate", "--to", tmp_path / "to")
    assert received.code == 0 and received.json["signer"] == "anna"
    assert received.json["reference"] == sent.json["reference"]
    assert (tmp_path / "to" / "1.dcm").read_bytes() == (scans / "1.dcm").read_bytes()
    told = permed("receive", "gate", "--to", tmp_path / "to")
    assert told.code == 0 and "3 files" in told.out and "signed by anna" in told.out


def test_people_see_progress_and_no_names(permed, scans, tmp_path):
    (tmp_path / "share").mkdir()
    told = permed("send", scans, tmp_path / "share")
    assert told.code == 0 and "not signed" in told.out and "sending: 100 % of 1.2 MiB" in told.err
    (volume,) = (tmp_path / "share").iterdir()
    received = permed("receive", volume, "--to", tmp_path / "to", "--unsigned")
    assert received.code == 0 and "every byte as it was sent; not signed" in received.out
    assert "Nordmann" not in told.out + told.err and ".dcm" not in told.out + told.err + received.out + received.err


def test_refusals_say_what_to_do(permed, scans, gate, tmp_path):
    for words, code, said in (
        (("send", scans, "gate"), Exit.USAGE, "--key"),
        (("send", scans, "nowhere"), Exit.NOT_FOUND, "Declared are: gate, kista"),
        (("send", scans, "gate", "--key", tmp_path / "key", "--data-class", "black"), Exit.REFUSED, "up to red"),
        (("send", tmp_path / "none", "gate", "--key", tmp_path / "key"), Exit.NOT_FOUND, "a file or a folder"),
        (("send", scans, "gate", "--key", tmp_path / "key", "--volume", "2"), Exit.USAGE, "512MiB"),
        (("send", scans, "gate", "--key", tmp_path / "key", "--data-class", "purple"), Exit.USAGE, "green, yellow"),
        (("receive", "kista", "--to", tmp_path / "to"), Exit.REFUSED, "goes one way"),
        (("receive", "gate", "--to", tmp_path / "to"), Exit.NOT_FOUND, "No set is there yet"),
        (("receive", "gate", "--to", tmp_path / "to", "--unsigned"), Exit.REFUSED, "signed sets only"),
    ):
        answer = permed(*words)
        assert answer.code == code, (words, answer)
        assert said in answer.err.replace("\n", " "), answer.err


def test_an_unsigned_set_needs_a_word(permed, scans, gate, tmp_path):
    (tmp_path / "share").mkdir()
    permed("send", scans, tmp_path / "share")
    answer = permed("receive", tmp_path / "share", "--to", tmp_path / "to")
    assert answer.code == Exit.REFUSED and "not signed" in answer.err and not (tmp_path / "to").exists()


def test_a_flipped_byte_ends_with_1(permed, scans, tmp_path):
    (tmp_path / "share").mkdir()
    permed("send", scans, tmp_path / "share")
    (volume,) = (tmp_path / "share").iterdir()
    content = bytearray(volume.read_bytes())
    content[700_000] ^= 1
    volume.write_bytes(content)
    answer = permed("--json", "receive", tmp_path / "share", "--to", tmp_path / "to", "--unsigned")
    assert answer.code == Exit.FAILED and '"damaged"' in answer.err and "File 2 of 3" in answer.err
    assert permed("send", scans, tmp_path / "share", "--anew").code == 0
    assert permed("receive", tmp_path / "share", "--to", tmp_path / "to", "--unsigned").code == 0


# ------------------------------------------------------------------------------------- jobs that wait for a set


@pytest.fixture
def waiting_job(job_file):
    """The job of `job_file`, with what is still to come as its input."""
    job_file.write_text(job_file.read_text().replace("inputs: [files]", "inputs: ['transfer:cohort-7/files']"))
    return job_file


@pytest.fixture
def share(permed, job_file, tmp_path):
    """A folder in which the set lies, sent by somebody: the files of the job, in a folder `files`."""
    (tmp_path / "share").mkdir()
    (tmp_path / "sent").mkdir()
    shutil.copytree(job_file.parent / "files", tmp_path / "sent" / "files")
    assert permed("send", tmp_path / "sent", tmp_path / "share").code == 0
    return tmp_path / "share"


def test_a_job_waits_for_the_set_that_it_names(permed, waiting_job, share, home):
    assert permed("validate", waiting_job, "--json").json[0]["notes"] == []
    preview = permed("submit", waiting_job, "--dry-run", "--json").json[0]
    assert not preview["starts_now"] and preview["code"] == "transfer" and not preview["inputs"][0]["exists"]
    [job] = permed("submit", waiting_job, "--json").json
    assert (job["state"], job["reason"]) == ("HELD", "transfer")
    why = permed("why", job["id"], "--json").json
    assert why["code"] == "transfer" and "have not come in: cohort-7" in why["sentence"]
    assert "permed receive SOURCE --name cohort-7" in why["change"]
    ran = permed("run", waiting_job)
    assert ran.code == Exit.INTERRUPTED and "starts when its files have come in" in ran.out
    refused = permed("release", job["id"])
    assert refused.code == Exit.REFUSED and "cohort-7" in refused.err

    other = permed("--json", "receive", share, "--unsigned", "--name", "another")
    assert other.code == 0 and other.json["queued"] == []
    received = permed("--json", "receive", share, "--unsigned", "--name", "cohort-7")
    assert job["id"] in received.json["queued"] and received.json["folder"].startswith(str(home.received))
    assert permed("resume", job["id"], "--json").code == 0
    ended = permed("status", job["id"], "--json").json
    assert (ended["state"], ended["detail"]["counts"]) == ("SUCCEEDED", {"DONE": 5})
    manifest = read_json(home.job(job["id"]).results / "manifest.json")
    assert manifest["sets"] == {"cohort-7": received.json["reference"]}
    assert manifest["spec_digest"] == preview["digest"]  # of the job as it was submitted


def test_a_set_that_is_in_place_is_not_waited_for(permed, waiting_job, share):
    permed("receive", share, "--unsigned", "--name", "cohort-7")
    ran = permed("run", waiting_job, "--json")
    assert ran.code == 0 and ran.json["jobs"][0]["detail"]["counts"] == {"DONE": 5}
    refused = permed("submit", waiting_job, "--set", "data_class=green")  # the set was sent as red
    assert refused.code == Exit.REFUSED and "is red; the job says that its data are green" in refused.err


def test_what_the_user_holds_stays_held_when_its_files_come(permed, waiting_job, share):
    [held] = permed("submit", waiting_job, "--hold", "--json").json
    [waits] = permed("submit", waiting_job, "--json").json
    assert (held["reason"], waits["reason"]) == ("held-by-user", "transfer")
    assert permed("hold", waits["id"]).code == 0
    assert permed("release", held["id"], "--json").json[0]["reason"] == "transfer"  # it waits for its files now
    received = permed("--json", "receive", share, "--unsigned", "--name", "cohort-7")
    assert received.json["queued"] == [held["id"]]
    assert permed("release", waits["id"], "--json").json[0]["state"] == "QUEUED"
