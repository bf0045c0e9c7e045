"""What a model misses makes every figure worse and is named; failures count; groups and models are compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from permed_compute.errors import SpecError, WorkloadError
from permed_compute.learning import evidence
from permed_compute.spec import JobSpec
from permed_compute.testing.context import Outcome, run_map
from permed_compute.workloads.radiology import nifti
from permed_compute.workloads.radiology.evaluate import WORKLOAD, params_of, traits_of

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
CASES = 12


def truth_of(number: int) -> np.ndarray:
    """An organ with a lesion in it; case 5 has none."""
    label = np.zeros((16, 14, 10), np.uint8)
    label[3:12, 3:11, 2:8] = 1
    if number != 5:
        label[5:8, 5 : 7 + number % 3, 4:6] = 2
    return label


def predicted_of(number: int) -> np.ndarray:
    """A voxel short everywhere, and worse at the second site."""
    label = truth_of(number)
    label[3] = 0
    if number % 2:
        label[11] = label[10] = 0
    return label


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A list on disk; `change` it and `run` it."""
    rows = []
    for number in range(CASES):
        files = {"t": truth_of(number), "p": predicted_of(number), "better": truth_of(number)}
        for kind, array in files.items():
            nifti.write(array, AFFINE, tmp_path / f"{kind}{number}.nii")
        nifti.write(np.where(files["p"] == 2, 0.75, 0.0).astype(np.float32), AFFINE, tmp_path / f"q{number}.nii")
        rows.append({
            "label": f"t{number}.nii", "predictions": {"ours": f"p{number}.nii", "theirs": f"better{number}.nii"},
            "image": f"t{number}.nii", "probability": {"ours": f"q{number}.nii"}, "subject": f"Kari {number}",
            "site": "south" if number % 2 else "north", "scanner": "X", "sex": "F", "age": 30 + 5 * number,
        })  # fmt: skip
    return {"folder": tmp_path, "rows": rows}


def run(given: dict[str, Any], name: str = "run", **params: Any) -> Outcome:
    index = given["folder"] / f"{name}.json"
    index.write_text(json.dumps({"labels": {"1": "organ", "2": "lesion"}, "cases": given["rows"]}))
    inputs = [{"name": "cases", "path": str(index)}]
    spec = JobSpec(name="evaluation", workload="radiology/evaluate", inputs=inputs, params={"lesions": 2, **params})
    return run_map(WORKLOAD, spec, given["folder"] / name)


def figures(outcome: Outcome, label: str = "2", model: str = "ours") -> dict[str, Any]:
    return outcome.result.values["models"][model]["structures"][label]


def test_a_missed_structure_makes_every_summary_worse_and_is_named(given: dict[str, Any]) -> None:
    before = run(given, "before", models=["ours"])
    assert before.result.values["missed"] == [] and figures(before)["counts"]["missed"] == 0
    missing = predicted_of(4)
    missing[missing == 2] = 1
    nifti.write(missing, AFFINE, given["folder"] / "p4.nii")
    after = run(given, "after", models=["ours"])
    for metric, is_worse in (("dice", np.less), ("nsd", np.less), ("hd95_mm", np.greater)):
        for end in ("mean", "low" if metric != "hd95_mm" else "high"):
            assert is_worse(figures(after)[metric][end], figures(before)[metric][end]), (metric, end)
        assert figures(after)[metric]["cases"] == figures(before)[metric]["cases"] == CASES - 1
    group = {row["group"]: row for row in after.result.values["subgroups"] if row["structure"] == "lesion"}
    assert group["north"]["missed"] == 1 and group["south"]["missed"] == 0
    detection = [outcome.result.values["models"]["ours"]["detection"] for outcome in (before, after)]
    assert detection[1]["score"] < detection[0]["score"] and detection[1]["found"] == CASES - 2
    [named] = after.result.values["missed"]
    assert named["structure"] == "lesion" and after.result.values["worst"][0]["case"] == named["case"]
    page = (after.context.out / "evaluation.html").read_text()
    assert page.count(named["case"]) >= 2 and "missed" in page and "data:image/png;base64," in page
    assert after.result.metrics["missed"] == 1.0
    assert "Kari" not in page + json.dumps(after.result.values)


@pytest.mark.parametrize("how", ["absent", "damaged", "moved"])
def test_a_prediction_that_cannot_be_used_missed_everything(given: dict[str, Any], how: str) -> None:
    path = given["folder"] / "p2.nii"
    if how == "absent":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        nifti.write(predicted_of(2), AFFINE + np.eye(4, k=3), path)
    outcome = run(given, models=["ours"])
    told = outcome.result.values
    [unusable] = told["models"]["ours"]["unusable"]
    assert {row["case"] for row in told["missed"]} == {unusable}
    assert figures(outcome, "1")["counts"] == {"found": CASES - 1, "missed": 1, "invented": 0, "absent": 0}
    [finding] = [finding for done in outcome.done for finding in done.findings]
    assert finding.code == "PREDICTION_UNUSABLE" and unusable == finding.about


def test_what_it_found_is_evidence_for_the_gate(given: dict[str, Any]) -> None:
    (given["folder"] / "p2.nii").unlink()
    outcome = run(given)
    told, found = outcome.result.values, evidence.read(outcome.context.out)
    assert (found.cases, found.patients, found.unscored) == (CASES, CASES, 0)
    digests = {hashlib.sha256((given["folder"] / f"p{n}.nii").read_bytes()).hexdigest() for n in range(CASES) if n != 2}
    assert set(found.predictions["ours"]) == digests and len(found.predictions["theirs"]) == CASES
    by_name = {(f.model, f.measure, f.trait, f.group): f for f in found.figures}
    lesion = figures(outcome)
    assert by_name["ours", "dice of lesion", "", ""].low == lesion["dice"]["low"]
    assert by_name["ours", "missed of lesion", "", ""].mean == lesion["counts"]["missed"] == 1
    assert by_name["ours", "hd95_mm of organ", "", ""].higher_is_better is False
    south = next(row for row in told["subgroups"] if row["group"] == "south" and row["structure"] == "organ")
    assert by_name["ours", "dice of organ", "site", "south"].mean == south["dice"]["mean"]
    assert by_name["ours", "dice of organ", "site", "south"].patients == 6
    before = found.dataset
    nifti.write(np.zeros((16, 14, 10), np.uint8), AFFINE, given["folder"] / "t3.nii")
    assert evidence.read(run(given, "changed").context.out).dataset != before


def test_a_case_without_truth_is_named_too(given: dict[str, Any]) -> None:
    (given["folder"] / "t3.nii").write_bytes(b"nothing")
    outcome = run(given)
    [failed] = outcome.failures
    assert outcome.result.values["unscored"] == [failed] and outcome.result.values["cases"] == CASES - 1
    assert failed in (outcome.context.out / "evaluation.html").read_text()


def test_a_site_that_does_worse_is_told_and_models_are_compared(given: dict[str, Any]) -> None:
    outcome = run(given)
    told = outcome.result.values
    organ = {row["group"]: row for row in told["subgroups"] if row["structure"] == "organ"}
    assert organ["south"]["worse"] and not organ["north"]["worse"] and organ["south"]["gap"]["high"] < 0
    assert organ["18 to under 40"]["cases"] == 2 and organ["18 to under 40"]["few"]
    [compared] = told["compared"]
    verdicts = {(row["structure"], row["metric"]): row["verdict"] for row in compared["rows"]}
    assert compared["model"] == "theirs" and verdicts["organ", "dice"] == verdicts["organ", "hd95_mm"] == "better"
    assert verdicts["lesion", "dice"] == "no clear difference"
    said = told["models"]["ours"]["calibration"]
    assert said["said"][-1] == 0.75 and said["is_so"][-1] == 1.0 and said["ece"] > 0.2
    assert told["models"]["theirs"]["calibration"] is None
    assert [row["dice"] for row in told["worst"]] == sorted(row["dice"] for row in told["worst"])


def test_ages_are_grouped_and_what_is_not_said_is_a_group() -> None:
    assert traits_of({"age": 65, "site": "A"}, [18, 40, 65]) == {
        "site": "A", "scanner": "not said", "sex": "not said", "age": "65 and older",
    }  # fmt: skip
    groups = [traits_of({"age": age}, [18, 40])["age"] for age in (0, 17.9, 18)]
    assert groups == ["0 to under 18"] * 2 + ["18 to under 40"]


def test_lists_and_params_that_cannot_be_used_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="nsd") as raised:
        params_of({"nsd": 1, "iou": 2, "worst": -1})
    assert len(raised.value.problems) == 3
    with pytest.raises(WorkloadError, match="model that is asked for"):
        run(given, models=["nobody"])
    given["rows"].append(given["rows"][0])
    with pytest.raises(WorkloadError, match="twice"):
        run(given)
    del given["rows"][0]["subject"]
    with pytest.raises(WorkloadError, match="cannot be used"):
        run(given)
