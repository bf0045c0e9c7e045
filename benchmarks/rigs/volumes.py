"""A CT-like volume for measurements, as store, NIfTI and DICOM: a noisy body in air, which packs as a real one does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

AFFINE = np.diag([-0.8, -0.8, 1.25, 1.0])
_KEPT: list[TemporaryDirectory[str]] = []


def folder() -> Path:
    _KEPT.append(TemporaryDirectory(prefix="permed-bench-volume-"))
    return Path(_KEPT[-1].name)


@cache
def ct(edge: int, slices: int = 0) -> np.ndarray:
    """(edge, edge, slices or edge) int16 HU: noise of 20 HU in soft tissue, of 8 HU in air."""
    random = np.random.default_rng(0)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in (edge, edge, slices or edge))
    inside = x[:, None, None] ** 2 + y[:, None] ** 2 + 0.5 * z**2 < 0.8
    noise = random.standard_normal(inside.shape, dtype=np.float32)
    ground = np.where(inside, 40 + 30 * x[:, None, None], np.float32(-1000))
    return np.asarray(np.clip(ground + noise * np.where(inside, np.float32(20), np.float32(8)), -1024, 3071), np.int16)


@cache
def store(edge: int) -> Path:
    """The volume's store."""
    from permed_compute.workloads.radiology import volume_store
    from permed_compute.workloads.radiology.read import Volume

    path = folder() / "v.zarr"
    volume = Volume(ct(edge), np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE, (), None, "b" * 64, "CT")
    volume_store.write(path, volume, inputs=[], threads=2)
    return path


@cache
def nifti(edge: int) -> Path:
    """The volume as .nii.gz."""
    from permed_compute.workloads.radiology import nifti as files

    path = folder() / "v.nii.gz"
    files.write(ct(edge), AFFINE, path, level=1)
    return path


@cache
def dicom(edge: int, slices: int, coding: str) -> Path:
    """A CT series, `plain` or `jpeg2000`."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

    path, array = folder(), ct(edge, slices)
    for k in range(slices):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f"1.2.3.4.{k + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
        ds.Modality, ds.PatientID, ds.PatientName, ds.InstanceNumber, ds.SeriesNumber = "CT", "B", "B", k + 1, 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImageOrientationPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.8, 0.8]
        ds.ImagePositionPatient, ds.SliceThickness = [0, 0, 1.25 * k], 1.25
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = edge, edge, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = 1, 0
        ds.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
        if coding == "jpeg2000":
            ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        ds.save_as(path / f"{k:04d}.dcm", enforce_file_format=True)
    return path
