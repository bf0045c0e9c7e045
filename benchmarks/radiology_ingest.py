"""Slices per CPU-second from DICOM to what is read afterwards: our store, MONAI's tensor, dcm2niix's NIfTI."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs import volumes

TITLE = "Ingesting DICOM"
WHY = (
    "A night's archive is a million slices. CT series of 512 × 512, plain and JPEG 2000, to a whole file on the disk."
    " Ours is `permed convert`: files digested, geometry checked, patches readable afterwards. MONAI (PydicomReader,"
    " torch.save) and dcm2niix (.nii) check less and write unpacked; dcm2niix -z y packs with gzip."
    " Goal: no slower than pydicom and MONAI."
)


def cases(quick: bool) -> list[Case]:
    found = []
    for group, slices, coding in (
        ("plain, slices per CPU-s", 12 if quick else 200, "plain"),
        ("JPEG 2000, slices per CPU-s", 4 if quick else 24, "jpeg2000"),
    ):
        edge = 128 if quick else 512
        found += [
            Case(group, "ours, to a store", "slices/s", "higher", timed(ours, edge, slices, coding), ratio=1.0,
                 goal="≥ pydicom + MONAI"),
            Case(group, "pydicom + MONAI", "slices/s", "higher", timed(monai, edge, slices, coding), peer=True),
            Case(group, "dcm2niix, .nii", "slices/s", "higher", timed(dcm2niix, edge, slices, coding), peer=True),
            Case(group, "dcm2niix, .nii.gz", "slices/s", "higher", timed(gzipped, edge, slices, coding), peer=True),
        ]  # fmt: skip
    return found


def timed(work: Callable[[Path, Path], None], edge: int, slices: int, coding: str) -> Callable[[], float]:
    def measure() -> float:
        source, out = volumes.dicom(edge, slices, coding), Path(tempfile.mkdtemp(prefix="permed-bench-ingest-"))
        try:
            began = _cpu()
            work(source, out)
            spent = _cpu() - began
            written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            if written < edge * edge * slices / 4:
                raise ValueError("too little was written")
            return slices / spent
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return measure


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass(frozen=True)
class Here:
    """What `permed convert` gives to `ingest.convert`."""

    out: Path
    digest: Callable[[Path], str]
    threads: int = 2

    def pseudonym(self, identifier: str) -> str:
        return "p"

    def stage(self, name: str) -> Any:
        return nullcontext()


def ours(source: Path, out: Path) -> None:
    from permed_compute.storage.digests import DigestCache
    from permed_compute.workloads.radiology import ingest

    here = Here(out, DigestCache(out / ".digests").digest)
    for item in ingest.convert([source], ingest.Params.of({"to": str(out)}), here):
        if isinstance(item, ingest.Converted) and item.error:
            raise item.error


def monai(source: Path, out: Path) -> None:
    import torch
    from monai.transforms import LoadImage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(LoadImage(reader="PydicomReader", image_only=True)(source), out / "volume.pt")


def dcm2niix(source: Path, out: Path, pack: str = "n") -> None:
    program = shutil.which("dcm2niix", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise LeftOutError("dcm2niix is not installed (extra: bench)")
    command = [program, "-z", pack, "-b", "n", "-f", "x", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)


def gzipped(source: Path, out: Path) -> None:
    dcm2niix(source, out, "y")
