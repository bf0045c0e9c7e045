"""What an evaluation found, in words that every domain shares: figures with intervals, of everybody and of each group.

An evaluation writes `evidence.json` beside its page. Whoever decides whether a model may be used on patients reads
this file and nothing else of a domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from permed_compute.errors import NotFoundError, WorkloadError
from permed_compute.paths import read_json, write_json

FILE = "evidence.json"
UNSAID = "not said"
"""The group of those of whom the list of cases does not say it."""
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of one model, of everybody (`trait` '') or of a group of patients.

    low, high: the mean's 95 % interval over patients; None where there is none (a count, or a single patient).
    """

    model: str
    measure: str
    higher_is_better: bool
    mean: float
    low: float | None
    high: float | None
    cases: int
    patients: int
    trait: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """dataset: digest of truths and images. unscored: cases of the list without any result.

    predictions: by model, the content digests of the predictions that were judged; absent ones are not among them.
    """

    dataset: str
    cases: int
    patients: int
    unscored: int
    predictions: Mapping[str, tuple[str, ...]]
    figures: tuple[Figure, ...]

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, {"format": _FORMAT, **asdict(self)})


def read(folder: Path) -> Evidence:
    """What `Evidence.write` left in a job's results. Raises `NotFoundError`, `WorkloadError`."""
    row = read_json(folder / FILE)
    if row is None:
        raise NotFoundError(
            "The job's results hold no evidence.json.", remedy="Name a job that evaluates, e.g. radiology/evaluate."
        )
    if row.pop("format", None) != _FORMAT:
        raise WorkloadError(f"{FILE} is of another format.", remedy="Run the evaluation again with this version.")
    figures = tuple(Figure(**figure) for figure in row.pop("figures"))
    predictions = {model: tuple(digests) for model, digests in row.pop("predictions").items()}
    return Evidence(predictions=predictions, figures=figures, **row)


def digest_of(contents: Iterable[str]) -> str:
    """Of a set of contents, in whatever order."""
    return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()
