"""Trials in rounds: proposed by what was found, the same ones from the same seed, none by a test scan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="optuna is not installed (extra: sweep)")
torch = pytest.importorskip("torch")

from permed_compute.errors import SpecError  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import Outcome, run_map  # noqa: E402
from permed_compute.workloads.radiology import phantoms, sweep, train  # noqa: E402

NETWORKS = [
    {"_target_": "UNet", "channels": [4, 8], "strides": [2], "norm": "instance"},
    {"_target_": "NoSuchNetwork"},
]  # fmt: skip
SHARED = {"patch": 16, "batch": 4, "per_volume": 1, "epochs": 1}
SPACE = {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "network": {"choices": NETWORKS}}


def run(root: Path, dataset: Path, seed: int = 3) -> Outcome:
    params = {"train": SHARED, "space": SPACE, "rounds": 2, "per_round": 2}
    inputs = [{"name": "dataset", "path": str(dataset)}]
    return run_map(
        sweep.WORKLOAD, JobSpec(name="t", workload="radiology/sweep", inputs=inputs, params=params, seed=seed), root
    )


def test_rounds_end_in_the_params_of_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = phantoms.write(tmp_path / "phantoms", 8, edge=20)
    looked: list[int] = []
    whole = train.Judge.segmented
    monkeypatch.setattr(train.Judge, "segmented", lambda self, model, scan: looked.append(
        scan in self.data.split.test) or whole(self, model, scan))  # fmt: skip
    outcome = run(tmp_path / "a", dataset)
    trials = outcome.result.values["trials"]
    assert len(trials) == 4 and looked and not any(looked), "no test scan was judged"
    for row in trials:
        assert (row["score"] is None) == (row["trial"]["network"]["_target_"] == "NoSuchNetwork")
        assert 1e-3 <= row["trial"]["learning_rate"] <= 1e-1
    best = json.loads((outcome.context.out / "best.json").read_text())
    assert best["score"] == max(row["score"] for row in trials if row["score"] is not None)
    assert train.params_of(best["params"])["epochs"] == 1
    assert len((outcome.context.out / "trials.tsv").read_text().splitlines()) == 5
    assert run(tmp_path / "b", dataset).result.values["trials"] == trials


def test_what_was_told_moves_what_is_proposed() -> None:
    space: dict[str, Any] = {"learning_rate": {"low": 0.0, "high": 1.0}, "batch": {"low": 1, "high": 8}}
    first = sweep.propose(space, [], 12, 1)
    assert first == sweep.propose(space, [], 12, 1) != sweep.propose(space, [], 12, 2)
    assert all(isinstance(trial["batch"], int) for trial in first)
    told = [{"trial": trial, "score": 1 - abs(trial["learning_rate"] - 0.2)} for trial in first]
    told[0]["score"] = None
    later = sweep.propose(space, told, 20, 1)
    near = [sum(abs(trial["learning_rate"] - 0.2) < 0.25 for trial in some) / len(some) for some in (first, later)]
    assert near[1] > near[0]


def test_wrong_spaces_are_named() -> None:
    wrong = {
        "space": {
            "epochs": {"low": 5, "high": 1}, "fold": {"choices": [0, 1]}, "colour": {"choices": [1]},
            "batch": {"choices": []}, "patience": 3,
        },
        "rounds": 0,
    }  # fmt: skip
    with pytest.raises(SpecError) as caught:
        sweep.params_of(wrong)
    assert len(caught.value.problems) == 6
    with pytest.raises(SpecError, match="nothing to try"):
        sweep.params_of({})
    with pytest.raises(SpecError, match=r"params\.epochs"):
        sweep.params_of({"space": SPACE, "train": {"epochs": 0}})
