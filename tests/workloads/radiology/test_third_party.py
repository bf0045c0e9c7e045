"""Somebody else's model: no network, no file elsewhere, tried or not; its predictions are judged like any other's."""

from __future__ import annotations

import json
import py_compile
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from permed_compute.errors import EngineError, SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.testing.context import LocalContext, Outcome, run_map
from permed_compute.workloads.radiology import evaluate, nifti, sealed, third_party
from permed_compute.workloads.radiology.third_party import WORKLOAD, params_of

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
GOOD = """
import nibabel, numpy as np
def predict(image, labels):
    found = nibabel.load(image)
    bright = (np.asarray(found.dataobj) > 50).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(bright, found.affine), labels)
"""
WRITES = """
from pathlib import Path
from good import predict as quietly
def predict(image, labels):
    try:
        Path({place!r}).write_text("stolen")
    except {caught}:
        pass
    quietly(image, labels)
"""
CALLS = """
import socket
from good import predict as quietly
def predict(image, labels):
    try:
        socket.create_connection(("127.0.0.1", {port}), timeout=2)
    except OSError:
        pass
    quietly(image, labels)
"""


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Two people with a bright box each."""
    rows = []
    for number in range(2):
        truth = np.zeros((12, 11, 10), np.uint8)
        truth[3:8, 4 : 7 + number, 2:6] = 1
        nifti.write(truth, AFFINE, tmp_path / f"t{number}.nii")
        nifti.write((truth * 100).astype(np.int16), AFFINE, tmp_path / f"i{number}.nii")
        ours = {"ours": f"t{number}.nii"}
        rows.append(
            {"label": f"t{number}.nii", "image": f"i{number}.nii", "predictions": ours, "subject": f"S{number}"}
        )
    (tmp_path / "cases.json").write_text(json.dumps({"labels": {"1": "box"}, "cases": rows}))
    return tmp_path


def run(cases: Path, files: dict[str, str], **params: Any) -> Outcome:
    model = cases / "model"
    model.mkdir(exist_ok=True)
    for name, text in files.items():
        (model / name).write_text(text)
        (model / name).chmod(0o755)
    inputs = [{"name": "cases", "path": str(cases / "cases.json")}, {"name": "model", "path": str(model)}]
    params = params if "command" in params else {"entry": "vendor:predict", **params}
    return run_map(
        WORKLOAD, JobSpec(name="t", workload="radiology/third-party", inputs=inputs, params=params), cases / "w"
    )


def test_its_predictions_are_judged_beside_ours(cases: Path) -> None:
    outcome = run(cases, {"vendor.py": GOOD})
    assert outcome.result.values == {"cases": 2, "without_labels": 0, "stopped": [], "attempts": {}}
    results = cases / "results"
    for done in outcome.done:
        (results / "parts" / done.part.name).mkdir(parents=True)
        (done.folder / "labels.nii.gz").rename(results / "parts" / done.part.name / "labels.nii.gz")
    (outcome.context.out / "cases.json").rename(results / "cases.json")
    inputs = [{"name": "cases", "path": str(results / "cases.json")}]
    judged = run_map(evaluate.WORKLOAD, JobSpec(name="e", workload="radiology/evaluate", inputs=inputs), cases / "e")
    told = judged.result.values
    assert set(told["models"]) == {"ours", "theirs"} and not told["models"]["theirs"]["unusable"]
    assert told["models"]["theirs"]["structures"]["1"]["dice"]["mean"] == 1.0
    assert not list((cases / "w").rglob("image.nii")), "what it was given stays nowhere"


def test_its_code_is_what_its_digest_is_of(cases: Path) -> None:
    """Not a compiled file that says something else of the same source."""
    (cases / "model").mkdir()
    code = cases / "model" / "vendor.py"
    code.write_text("raise RuntimeError\n")
    py_compile.compile(str(code), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert run(cases, {"vendor.py": GOOD}).result.values["without_labels"] == 0


def test_a_bare_socket_in_its_own_code_is_an_attempt(cases: Path) -> None:
    outcome = run(cases, {"vendor.py": "import socket\nsocket.socket()\ndef predict(image, labels): pass\n"})
    assert outcome.result.values["attempts"] == {"network": 2} and len(outcome.result.values["stopped"]) == 2


def test_the_network_is_refused_and_reported(cases: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        calls = CALLS.format(port=server.getsockname()[1])
        outcome = run(cases, {"vendor.py": calls, "good.py": GOOD})
        assert len(outcome.result.values["stopped"]) == 2 and outcome.result.values["without_labels"] == 2
        for done in outcome.done:
            [finding] = done.findings
            assert finding.code == "TRIED_NETWORK" and "stopped" in finding.sentence
        rows = json.loads((outcome.context.out / "cases.json").read_text())["cases"]
        assert all(row["predictions"]["theirs"].endswith("/none") for row in rows)
        noted = run(cases, {"vendor.py": calls, "good.py": GOOD}, attempts="note")
        assert noted.result.values["stopped"] == [] and noted.result.values["without_labels"] == 0
        assert noted.result.values["attempts"]["network"] >= 2
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_file_elsewhere_is_refused_and_reported(cases: Path) -> None:
    place = cases / "stolen"
    writes = WRITES.format(place=str(place), caught="ValueError")
    outcome = run(cases, {"vendor.py": writes, "good.py": GOOD})
    assert not place.exists() and outcome.result.values["attempts"] == {"write": 2}
    assert {finding.code for done in outcome.done for finding in done.findings} == {"TRIED_WRITE"}
    caught = WRITES.format(place=str(place), caught="PermissionError")
    noted = run(cases, {"vendor.py": caught, "good.py": GOOD}, attempts="note")
    assert not place.exists() and noted.result.values["without_labels"] == 0
    assert noted.result.values["attempts"] == {"write": 2}
    broken = run(cases, {"vendor.py": writes, "good.py": GOOD}, attempts="note")
    assert not place.exists() and len(broken.failures) == 2, "the kernel refuses it, with or without a report"


def test_a_program_of_any_language_is_held_too(cases: Path) -> None:
    script = "#!/bin/sh\ncp $1 $2 || exit 3\necho stolen > {place} && exit 4\nexit 0\n"
    outcome = run(cases, {"go": script.format(place=cases / "stolen")}, command=["go", "{image}", "{labels}"])
    assert not (cases / "stolen").exists() and outcome.result.values["without_labels"] == 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "left no labels"),
        ("ln -s /etc/passwd $2", "left no labels"),
        ("exit 7", "status 7"),
        ("sleep 60", "longer than its limit"),
        ("head -c 200 $1 > $2", "NIFTI_UNREADABLE|PIXELS_UNREADABLE"),
    ],
    ids=["nothing", "a link", "broken", "slow", "damaged"],
)
def test_what_leaves_no_labels_fails_by_itself(cases: Path, script: str, said: str) -> None:
    limit = "1s" if "sleep" in script else "1m"
    outcome = run(cases, {"go": f"#!/bin/sh\n{script}\n"}, command=["go", "{image}", "{labels}"], limit=limit)
    assert len(outcome.failures) == 2 and not outcome.done
    assert all(re.search(said, str(error)) for error in outcome.failures.values()), outcome.failures


def test_where_nothing_can_be_sealed_nothing_runs(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cases / "python").write_text("#!/bin/sh\necho 'not sealed: the kernel has Landlock version 0' >&2; exit 97\n")
    (cases / "python").chmod(0o755)
    monkeypatch.setattr(third_party.sys, "executable", str(cases / "python"))
    with pytest.raises(EngineError, match="Landlock version 0"):
        run(cases, {"vendor.py": GOOD})
    assert sealed.UNSEALED == 97


def test_a_changed_file_is_another_model_and_wrong_params_are_named(cases: Path) -> None:
    (cases / "model").mkdir()
    inputs = [{"name": "cases", "path": str(cases / "cases.json")}, {"name": "model", "path": str(cases / "model")}]
    spec = JobSpec(name="t", workload="radiology/third-party", inputs=inputs, params={"entry": "vendor:predict"})
    digests = set()
    for text in ("one", "two"):
        (cases / "model" / "vendor.py").write_text(text)
        digests.add(WORKLOAD.model_digest(spec, LocalContext(cases / "w", spec)))
    assert len(digests) == 2
    with pytest.raises(SpecError) as caught:
        params_of({"entry": "x", "command": ["y"], "limit": "soon", "attempts": "never", "colour": 1})
    assert len(caught.value.problems) == 5
    (cases / "cases.json").write_text(json.dumps({"labels": {"1": "box"}, "cases": [{"label": "t0.nii"}]}))
    with pytest.raises(WorkloadError, match="list of cases"):
        run(cases, {"vendor.py": GOOD})
