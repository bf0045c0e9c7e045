"""Data sets of NIfTI as they are laid out.

    Decathlon    dataset.json lists pairs; an image may hold several modalities on its fourth axis
    nnU-Net 2    dataset.json has channel_names; imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, imagesTs
    nnU-Net 1    the list of the Decathlon and the names of nnU-Net

Elsewhere every .nii and .nii.gz below a folder is an image.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.errors import Finding, WorkloadError
from permed_compute.workloads.radiology import nifti
from permed_compute.workloads.radiology.volume_store import Kind

INDEX = "dataset.json"
_CHANNEL = re.compile(r"_(\d{4})$")


@dataclass(frozen=True, slots=True)
class File:
    """One volume of a case. channel: its number on the fourth axis of a file that holds several, else None."""

    path: Path
    kind: Kind = "image"
    channel: int | None = None
    modality: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """What belongs together: one image per channel, and the label where there is one. `split`: training or test."""

    name: str
    images: tuple[File, ...]
    label: File | None = None
    split: str = "training"

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.images, self.label) if self.label else self.images


@dataclass(frozen=True, slots=True)
class Layout:
    """A data set: its cases, what its index says of modalities and classes, and what is wrong with it."""

    cases: tuple[Case, ...]
    modalities: Mapping[str, str]
    labels: Mapping[str, str]
    findings: tuple[Finding, ...] = ()


def is_dataset(path: Path) -> bool:
    return (path / INDEX).is_file() and any((path / name).is_dir() for name in ("imagesTr", "imagesTs"))


def plain(path: Path) -> list[File]:
    """Every NIfTI at or below the path, hidden ones left out, sorted."""
    if path.is_file():
        return [File(path)] if nifti.is_nifti(path) else []
    found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [File(file) for file in sorted(found) if nifti.is_nifti(file) and not file.name.startswith(".")]


def read(folder: Path) -> Layout:
    """The data set in a folder for which `is_dataset` holds. Raises `WorkloadError` where its index cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        modalities = {str(k): str(v) for k, v in (index.get("channel_names") or index.get("modality") or {}).items()}
        labels = _labels(index.get("labels") or {})
    except (OSError, ValueError, AttributeError) as error:
        raise WorkloadError(
            f"dataset.json cannot be read ({error.__class__.__name__}).", remedy="Compare it with nnU-Net's format."
        ) from None
    modalities = modalities or {"0": ""}
    if "channel_names" in index or "training" not in index:
        cases, missing = _by_name(folder, modalities, str(index.get("file_ending", ".nii.gz"))), 0
    else:
        cases, missing = _by_list(folder, index, modalities)
    findings = []
    if missing:
        sentence = f"{missing} file(s) that dataset.json names are not there; their cases were left out."
        findings.append(Finding("FILE_MISSING", sentence, "refused", numbers={"files": missing}))
    return Layout(tuple(cases), modalities, labels, tuple(findings))


def _labels(given: Mapping[str, Any]) -> dict[str, str]:
    """{number: name}; nnU-Net 2 writes it the other way round, with lists for regions, which are no classes."""
    if all(str(key).isdigit() for key in given):
        return {str(key): str(value) for key, value in given.items()}
    return {str(value): str(key) for key, value in given.items() if isinstance(value, int)}


def _by_name(folder: Path, modalities: Mapping[str, str], ending: str) -> list[Case]:
    cases = []
    for split, images, labels in (("training", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs")):
        groups: dict[str, dict[int, Path]] = {}
        for file in sorted((folder / images).glob(f"*{ending}")):
            stem = file.name.removesuffix(ending)
            match = _CHANNEL.search(stem)
            if match and not stem.startswith("."):
                groups.setdefault(stem[: match.start()], {})[int(match[1])] = file
        for name, files in groups.items():
            label = folder / labels / f"{name}{ending}"
            cases.append(
                Case(name, _channels(files, modalities), File(label, "label") if label.is_file() else None, split)
            )
    return cases


def _channels(files: Mapping[int, Path], modalities: Mapping[str, str]) -> tuple[File, ...]:
    return tuple(File(files[n], modality=modalities.get(str(n), "")) for n in sorted(files))


def _by_list(folder: Path, index: Mapping[str, Any], modalities: Mapping[str, str]) -> tuple[list[Case], int]:
    cases, missing = [], 0
    for split, entries in (("training", index.get("training") or ()), ("test", index.get("test") or ())):
        for entry in entries:
            row = entry if isinstance(entry, Mapping) else {"image": entry}
            images = _images(_inside(folder, row.get("image")), modalities)
            label = _inside(folder, row.get("label")) if row.get("label") else None
            if not images or (label is not None and not label.is_file()):
                missing += 1
                continue
            name = _stem(images[0].path)
            cases.append(Case(name, images, File(label, "label") if label else None, split))
    return cases, missing


def _inside(folder: Path, name: Any) -> Path:
    """The file of that name below the folder; a name that leads out of it is none."""
    path = (folder / str(name)).resolve()
    return path if path.is_relative_to(folder.resolve()) else folder / "…"


def _images(path: Path, modalities: Mapping[str, str]) -> tuple[File, ...]:
    if path.is_file():
        if len(modalities) == 1:
            return (File(path, modality=next(iter(modalities.values()))),)
        return tuple(File(path, "image", n, modalities[key]) for n, key in enumerate(sorted(modalities, key=int)))
    stem = _stem(path)
    files = {
        n: file
        for n in range(len(modalities))
        if (file := path.with_name(f"{stem}_{n:04d}{path.name[len(stem) :]}")).is_file()
    }
    return _channels(files, modalities) if len(files) == len(modalities) else ()


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
