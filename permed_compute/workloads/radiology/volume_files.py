"""Volumes that are files of their own, NIfTI and stores: found, named by their content, and read whole."""

from __future__ import annotations

import os
from pathlib import Path

from permed_compute.errors import RefusedInput
from permed_compute.workloads.port import Context
from permed_compute.workloads.radiology import nifti, volume_store
from permed_compute.workloads.radiology.read import Volume


def find(path: Path) -> list[Path]:
    """NIfTI files and stores at or below the path, sorted; hidden ones (a store that is being written) left out."""
    if is_one(path):
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        here = [Path(folder, name) for name in (*folders, *names) if not name.startswith(".")]
        found += [one for one in here if is_one(one)]
        folders[:] = [name for name in folders if not name.endswith(volume_store.SUFFIX)]
    return sorted(found)


def is_one(path: Path) -> bool:
    """By its name; whether it can be used is seen where it is read."""
    return path.is_dir() if path.name.endswith(volume_store.SUFFIX) else nifti.is_nifti(path) and path.is_file()


def is_within(source: str, below: Path) -> bool:
    """Whether a file at or below `below` is NIfTI or a piece of a store; what lies above an input says nothing."""
    path = Path(source)
    return nifti.is_nifti(path) or any(
        part.endswith(volume_store.SUFFIX) for part in path.relative_to(below.parent).parts
    )


def content_digest(path: Path, ctx: Context) -> str:
    """Of a NIfTI file, or of a store: its `zarr.json` says the digest of its voxels."""
    return ctx.digest(path / "zarr.json" if path.is_dir() else path)


def nbytes(path: Path, about: str) -> int:
    """Of the volume as float64; 0 where that cannot be told. Reads the header only."""
    try:
        x, y, z, *_ = volume_store.VolumeStore(path).shape if path.is_dir() else nifti.shape_of(path, about)
    except (RefusedInput, ValueError):
        return 0  # refused by name where it is read
    return x * y * z * 8


def read(path: Path, ctx: Context) -> Volume:
    """A store or NIfTI, without the headers of slices. Raises `RefusedInput`."""
    if path.is_dir():
        return volume_store.VolumeStore(path).volume()
    return nifti.read(path, ctx.digest(path))[0]
