"""Small made-up series, slice by slice, so that each test can spoil exactly one thing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from permed_compute.workloads.dicomresult import derived_uid
from permed_compute.workloads.radiology import read

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def plane(k: int, *, rows: int = 12, columns: int = 10, gap: float = 2.0, series: str = "a") -> Dataset:
    """Plane k of a regular oblique MR series with its own pattern of pixels."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = MR_IMAGE
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("test", series, str(k))
    ds.StudyInstanceUID = derived_uid("test", "study")
    ds.SeriesInstanceUID = derived_uid("test", series)
    ds.FrameOfReferenceUID = derived_uid("test", "frame")
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.Modality, ds.PatientID, ds.PatientName = "MR", "P1", "Test^Patient"
    ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ds.StudyID = ""
    ds.AccessionNumber = "ACC1"
    ds.InstanceNumber = k + 1
    tilt = np.radians(20)
    row = np.array([np.cos(tilt), np.sin(tilt), 0.0])
    column = np.array([0.0, 0.0, -1.0])
    normal = np.cross(row, column)
    ds.ImageOrientationPatient = [f"{value:.10f}" for value in (*row, *column)]
    ds.ImagePositionPatient = [f"{value:.9f}" for value in np.array([-30.0, 12.5, 41.25]) + k * gap * normal]
    ds.PixelSpacing = ["0.75", "1.25"]
    ds.SliceThickness = "2"
    ds.Rows, ds.Columns = rows, columns
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    pixels = (1000 * k + np.arange(rows * columns)).reshape(rows, columns).astype("<i2")
    ds.PixelData = pixels.tobytes()
    return ds


Edit = Callable[[int, Dataset], Dataset | None]


def write(folder: Path, count: int = 8, edit: Edit = lambda k, ds: ds, **how: object) -> list[Path]:
    """Write `count` planes; `edit` may change one, or return None to leave it out."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(count):
        ds = edit(k, plane(k, **how))
        if ds is not None:
            files.append(folder / f"IM{k:03d}")
            ds.save_as(files[-1], enforce_file_format=True)
    return files


def scan(folder: Path) -> read.Inventory:
    return read.scan(read.find(folder), sha256, threads=2)


def load(folder: Path) -> read.Volume:
    (series,) = scan(folder).series
    return read.assemble(series, threads=2)


def codes(findings: object) -> list[str]:
    return [finding.code for finding in findings]
