"""Jobs, models, presets, sites and workloads by name: what ships with the package, found by importlib.resources."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from permed_compute.errors import NotFoundError

KINDS = ("jobs", "models", "presets", "sites", "workloads")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that can be named. `title` is one line for people; `path` is '' for what is not a file."""

    kind: str
    name: str
    title: str
    path: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "name": self.name, "title": self.title, "path": self.path}


def entries(*kinds: str) -> list[Entry]:
    """Everything of these kinds (all, where none is named), by kind and name. Raises `NotFoundError`."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise NotFoundError(f"The catalogue has no {unknown[0]!r}.", remedy=f"It has: {', '.join(KINDS)}.")
    return [entry for kind in (kinds or KINDS) for entry in sorted(_FIND[kind](), key=lambda entry: entry.name)]


def job_file(name: str) -> Path:
    """The job file of a shipped job such as `radiology/brain-extraction`. Raises `NotFoundError`."""
    found = {entry.name: entry.path for entry in _jobs()}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else "`permed catalog jobs` lists the ones that ship."
        raise NotFoundError(f"There is no job file {name!r}, and no shipped job of that name.", remedy=hint)
    return Path(found[name])


def _jobs() -> Iterator[Entry]:
    for place, name in _walk("permed_compute.jobs", "job.yaml"):
        yield Entry("jobs", name, _title(place / "job.yaml"), _path(place / "job.yaml"))


def _models() -> Iterator[Entry]:
    import json

    for place, name in _walk("permed_compute.models", "configs"):
        file = place / "configs" / "metadata.json"
        if file.is_file():
            title = str(json.loads(file.read_text(encoding="utf-8")).get("description", ""))
            yield Entry("models", name, title.splitlines()[0] if title else "", _path(place))


def _presets() -> Iterator[Entry]:
    return _yaml_files("presets", resources.files("permed_compute.configs"))


def _sites() -> Iterator[Entry]:
    return _yaml_files("sites", resources.files("permed_compute.cluster") / "sites")


def _workloads() -> Iterator[Entry]:
    from permed_compute.workloads.registry import CATALOG

    for name, target in CATALOG.items():
        yield Entry("workloads", name, target)


def _yaml_files(kind: str, folder: Traversable) -> Iterator[Entry]:
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if file.name.endswith(".yaml"):
            yield Entry(kind, file.name.removesuffix(".yaml"), _title(file), _path(file))


def _walk(package: str, marker: str) -> Iterator[tuple[Traversable, str]]:
    """Folders `<domain>/<name>` of the package that hold `marker`."""
    for domain in _folders(resources.files(package)):
        for place in _folders(domain):
            if (place / marker).is_file() or (place / marker).is_dir():
                yield place, f"{domain.name}/{place.name}"


def _folders(place: Traversable) -> Iterator[Traversable]:
    return (entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(("_", ".")))


def _title(file: Traversable) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    said = " ".join(line.removeprefix("#").strip() for line in lines)
    return said.partition(". ")[0].removesuffix(".")


def _path(place: Traversable) -> str:
    return str(place) if isinstance(place, Path) else ""


_FIND: dict[str, Any] = {
    "jobs": _jobs, "models": _models, "presets": _presets, "sites": _sites, "workloads": _workloads,
}  # fmt: skip
