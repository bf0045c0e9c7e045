"""A real head as a valid DICOM MR series for machines without the shared data: what `permed demo` falls back to.

The picture is real (Debian's `mricron-data` template of one living head, else the MNI152 average that `nilearn` ships,
which is already skull-stripped); patient, study and equipment are made up and marked as such.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import NotFoundError
from permed_compute.workloads.dicomresult import derived_uid

_DEBIAN = ("share/mricron/templates/ch2.nii.gz",)
_NILEARN = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True, slots=True)
class SampleInfo:
    """What was written. `source` is a sentence for the reader; `files` are in order of position, study by study."""

    source: str
    skull_stripped: bool
    files: tuple[Path, ...]


def find_head() -> tuple[Path, str, bool]:
    """(NIfTI file, where it comes from, skull-stripped?). Raises `NotFoundError`."""
    for prefix in (Path("/usr"), Path("/usr/local")):
        for name in _DEBIAN:
            if (prefix / name).is_file():
                return prefix / name, "Debian mricron-data ch2: one real head, T1, 27 scans averaged (colin27)", False
    spec = importlib.util.find_spec("nilearn")
    if spec is not None and spec.origin:
        path = Path(spec.origin).parent / _NILEARN
        if path.is_file():
            return path, "nilearn MNI152 T1: the average of 152 heads, already skull-stripped", True
    raise NotFoundError(
        "There is no head to write.",
        remedy="Install permed-compute[demo] (nilearn), or Debian's mricron-data, or name a DICOM folder of your own.",
    )


def write_sample(folder: Path, *, studies: int = 1, seed: int = 0, edge: int | None = None) -> SampleInfo:
    """Write `studies` distinct one-series MR studies below `folder` (`study-000/000.dcm` …).

    edge: keep every n-th voxel so that no side is longer than this (quick tests); None keeps the full resolution.
    Studies differ by a scale and noise drawn from (seed, study); the same arguments write the same bytes.
    Raises `NotFoundError` where no head is installed.
    """
    import nibabel

    path, source, stripped = find_head()
    to_canonical: Any = nibabel.as_closest_canonical
    image = to_canonical(nibabel.load(path))
    step = 1 if edge is None else max(1, -(-max(image.shape[:3]) // edge))
    array = np.asarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])[::step, ::step, ::step]
    affine = image.affine @ np.diag([step, step, step, 1.0])
    array = np.clip(array / max(float(array.max()), 1e-6), 0, 1)
    files: list[Path] = []
    for study in range(studies):
        random = np.random.default_rng((seed, study))
        bright = array * random.uniform(2800, 3600) if studies > 1 else array * 3200
        noise = random.normal(0, 8, array.shape) if studies > 1 else 0
        values = np.clip(bright + noise, 0, 4095).astype(np.uint16)
        files += _write_series(
            folder / f"study-{study:03d}", values, affine, name=f"{seed}/{study}/{step}", number=study
        )
    return SampleInfo(source, stripped, tuple(files))


def _write_series(folder: Path, values: np.ndarray, affine_ras: np.ndarray, *, name: str, number: int) -> list[Path]:
    """Axial slices of a canonical RAS array: rows run to the left, columns to the back, slices to the head."""
    folder.mkdir(parents=True, exist_ok=True)
    values = values[::-1, ::-1, :]
    flip = np.eye(4)
    flip[0, 0] = flip[1, 1] = -1
    flip[0, 3], flip[1, 3] = values.shape[0] - 1, values.shape[1] - 1
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_ras @ flip
    written = []
    for k, ds in enumerate(_slices(values, affine, name, number)):
        path = folder / f"{k:03d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        written.append(path)
    return written


def _slices(values: np.ndarray, affine: np.ndarray, name: str, number: int) -> Iterator[Any]:
    from pydicom.valuerep import DSfloat

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :2] / spacing[:2]

    def decimals(numbers: Any) -> list[DSfloat]:
        return [DSfloat(float(value), auto_format=True) for value in numbers]

    for k in range(values.shape[2]):
        ds = _header(name, number)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("sample", name, "instance", str(k))
        ds.InstanceNumber = k + 1
        ds.ImagePositionPatient = decimals(affine[:3, 3] + k * affine[:3, 2])
        ds.ImageOrientationPatient = decimals(cosines.T.ravel())
        ds.PixelSpacing = decimals([spacing[1], spacing[0]])
        ds.SliceThickness, ds.SpacingBetweenSlices = decimals([spacing[2], spacing[2]])
        ds.Columns, ds.Rows = values.shape[:2]
        ds.PixelData = np.ascontiguousarray(values[:, :, k].T).astype("<u2").tobytes()
        yield ds


def _header(name: str, number: int) -> Any:
    """Everything that the MR Image IOD asks for (PS3.3 A.4.3) and that the picture does not decide."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = MRImageStorage
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "120000"
    ds.AccessionNumber = f"SAMPLE{number:04d}"
    ds.Modality = "MR"
    ds.Manufacturer = "permed_compute sample"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "Sample head, made-up patient"
    ds.SeriesDescription = "T1 head"
    ds.PatientName = f"Sample^Head {number:04d}"
    ds.PatientID = f"SAMPLE-{number:04d}"
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "Public template, made-up patient"
    ds.BodyPartExamined = "HEAD"
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = "GR", "MP", ""
    ds.MRAcquisitionType = "3D"
    ds.RepetitionTime = ds.EchoTime = None
    ds.EchoTrainLength = 1
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = derived_uid("sample", name, "study")
    ds.SeriesInstanceUID = derived_uid("sample", name, "series")
    ds.FrameOfReferenceUID = derived_uid("sample", name, "frame")
    ds.PositionReferenceIndicator = ""
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber = f"{number}", 1, 1
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = 1600, 3200
    return ds
