"""NIfTI in and out: a checked `Volume` from a file, and an array with its affine as a file.

NIfTI says less of itself than DICOM and readers guess the rest; what would be guessed is refused here, with numbers.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding
from permed_compute.workloads.radiology import geometry
from permed_compute.workloads.radiology.read import Volume

SUFFIXES = (".nii", ".nii.gz")
SHEAR_DEGREES = 0.1
AFFINES_MM = 0.01
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MM_UNITS = (0, 2)
"""xyzt_units: not said, or mm."""


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def shape_of(path: Path, about: str) -> tuple[int, ...]:
    """Voxels along each axis, trailing ones cut off, from the header alone. Raises `RefusedInput`."""
    return _shape(_header(path, about))


def read(path: Path, about: str, *, channel: int | None = None) -> tuple[Volume, tuple[float, float] | None]:
    """The file as a regular volume, and the (slope, intercept) that its header declares, if any.

    about: its digest. channel: of a 4-D file whose fourth axis holds channels; else 4-D is refused.
    Raises `RefusedInput`: NIFTI_UNREADABLE, PIXELS_UNREADABLE, DIMENSIONS, SINGLE_SLICE, SPACING_INVALID, UNITS,
    NO_ORIENTATION, AFFINE_INVALID, AFFINE_SHEARED, NOT_GREYSCALE, RESCALE_INVALID.
    """
    header = _header(path, about)
    shape = _shape(header)
    _check_shape(shape, channel, about)
    affine = _affine(header, about)
    slope, intercept = _scaling(header, about)
    values, reduced = _values(_raw(path, header, about), slope, intercept, shape, channel)
    findings = [*_notes(header, affine, about), *_of_values(values, reduced, about)]
    volume = Volume(values, _TO_LPS @ affine, (), None, about, "", tuple(findings))
    return volume, None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _header(path: Path, about: str) -> Any:
    """The header as it stands: nibabel's own loading mends negative spacings without a word."""
    from nibabel import Nifti1Header, Nifti2Header

    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            size = file.read(4)
            file.seek(0)
            second = size in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
            header: Any = (Nifti2Header if second else Nifti1Header).from_fileobj(file, check=False)  # type: ignore[no-untyped-call]
        if not 1 <= int(header["dim"][0]) <= 7 or header["magic"].item()[:3] not in (b"n+1", b"n+2"):
            raise ValueError("not a single-file NIfTI")
    except Exception as error:  # noqa: BLE001 - nibabel raises whatever it likes on bytes that are no header
        geometry.refuse(
            "NIFTI_UNREADABLE", f"A file is not a NIfTI-1 or NIfTI-2 in one piece ({error.__class__.__name__}).", about,
            "Write it again as .nii or .nii.gz.",
        )  # fmt: skip
    return header


def _shape(header: Any) -> tuple[int, ...]:
    shape = [int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])]]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _check_shape(shape: tuple[int, ...], channel: int | None, about: str) -> None:
    if len(shape) != (3 if channel is None else 4) or min(shape) < 1:
        geometry.refuse(
            "DIMENSIONS", f"The file has {len(shape)} dimensions {list(shape)}; a volume has 3.", about,
            "Split time points, or list the file as an image of several modalities in a Decathlon dataset.json.",
            dimensions=len(shape), shape=list(shape),
        )  # fmt: skip
    if min(shape[:3]) < 2:
        geometry.refuse(
            "SINGLE_SLICE", "The file has one slice; a volume needs at least two.", about, shape=list(shape)
        )


def _affine(header: Any, about: str) -> np.ndarray:
    """(i, j, k, 1) → RAS mm: sform, else qform."""
    spacing = header["pixdim"][1:4].astype(float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        geometry.refuse(
            "SPACING_INVALID", "pixdim is not above zero along every axis.", about,
            pixdim=[float(v) if np.isfinite(v) else str(v) for v in spacing],
        )  # fmt: skip
    units = int(header["xyzt_units"]) & 7
    if units not in _MM_UNITS:
        geometry.refuse("UNITS", f"Lengths are not in mm (xyzt_units {units}).", about, xyzt_units=units)
    if int(header["sform_code"]) > 0:
        affine = np.asarray(header.get_sform(), float)
    elif int(header["qform_code"]) > 0:
        affine = np.asarray(header.get_qform(), float)
    else:
        geometry.refuse(
            "NO_ORIENTATION", "sform_code and qform_code are 0: the file does not say how it lies in the patient.",
            about, "Write the affine of the series it comes from into it.",
        )  # fmt: skip
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() <= 0:
        geometry.refuse(
            "AFFINE_INVALID", "The affine has an axis without length, or values that are no numbers.", about
        )
    cosines = affine[:3, :3] / lengths
    angles = np.degrees(np.arccos(np.clip([cosines[:, a] @ cosines[:, b] for a, b in ((0, 1), (0, 2), (1, 2))], -1, 1)))
    shear = float(np.abs(angles - 90).max())
    if shear > SHEAR_DEGREES:
        geometry.refuse(
            "AFFINE_SHEARED", f"The axes are {shear:.2f}° from a right angle.", about,
            "Resample the volume to a straight grid first, and keep the original.", shear_degrees=round(shear, 4),
        )  # fmt: skip
    return affine


def _scaling(header: Any, about: str) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):  # the standard's "no scaling"
        return 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        geometry.refuse("RESCALE_INVALID", "scl_slope and scl_inter are not both numbers.", about)
    return slope, intercept


def _raw(path: Path, header: Any, about: str) -> np.ndarray:
    """Stored values, all axes."""
    from nibabel import Nifti1Image, Nifti2Image

    dtype = header.get_data_dtype()
    if dtype.names or dtype.kind not in "iuf":
        geometry.refuse("NOT_GREYSCALE", "The file holds colours or complex numbers.", about)
    kind: Any = Nifti2Image if int(header["sizeof_hdr"]) == 540 else Nifti1Image
    try:
        return np.asarray(kind.from_filename(path, mmap=False).dataobj.get_unscaled())
    except Exception as error:  # noqa: BLE001 - gzip, zlib, nibabel and numpy each have errors of their own
        geometry.refuse(
            "PIXELS_UNREADABLE", f"The voxels of one file cannot be read ({error.__class__.__name__}): truncated or"
            " damaged.", about, "Fetch the file again.",
        )  # fmt: skip


def _values(
    raw: np.ndarray, slope: float, intercept: float, shape: Sequence[int], channel: int | None
) -> tuple[np.ndarray, int]:
    """Values of the volume, and how many of them float32 could not hold."""
    raw = raw.reshape(tuple(shape))
    if channel is not None:
        raw = raw[..., channel]
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    if raw.dtype.kind in "iu" and slope == 1.0 and intercept == int(intercept):
        shifted = raw if intercept == 0 else raw.astype(np.int64) + int(intercept)
        limits = np.iinfo(np.int16)
        fits = shifted.min() >= limits.min and shifted.max() <= limits.max
        values = shifted.astype(np.int16 if fits else np.float32, copy=False)
    else:
        shifted = raw if (slope, intercept) == (1.0, 0.0) else raw * np.float64(slope) + intercept
        values = shifted.astype(np.float32, copy=False)
    lossy = values.dtype == np.float32 and raw.dtype.itemsize >= 4 and raw.dtype != np.float32
    same = values.astype(shifted.dtype) == shifted if lossy else np.True_
    if shifted.dtype.kind == "f" and lossy:
        same |= np.isnan(shifted)
    return values, int(np.size(same) - np.count_nonzero(same))


def _notes(header: Any, affine: np.ndarray, about: str) -> list[Finding]:
    if int(header["sform_code"]) <= 0 or int(header["qform_code"]) <= 0:
        return []
    other = np.asarray(header.get_qform(), float)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in _shape(header)[:3]], [1.0])).reshape(4, -1)
    apart = float(np.abs((affine - other) @ corners).max())
    if apart <= AFFINES_MM:
        return []
    sentence = f"sform and qform place the volume up to {apart:.3f} mm apart; sform counts."
    return [Finding("AFFINES_DIFFER", sentence, "note", about, {"apart_mm": round(apart, 4)})]


def _of_values(values: np.ndarray, reduced: int, about: str) -> list[Finding]:
    notes = []
    if reduced:
        sentence = f"{reduced} values need more than float32 and were rounded."
        notes.append(Finding("PRECISION_REDUCED", sentence, "note", about, {"voxels": reduced}))
    bad = 0 if values.dtype.kind != "f" else int(values.size - np.isfinite(values).sum())
    if bad:
        notes.append(Finding("NOT_FINITE", f"{bad} voxels are NaN or infinite.", "note", about, {"voxels": bad}))
    return notes


def with_modality(volume: Volume, modality: str) -> Volume:
    """The same, named: NIfTI does not say what it shows."""
    return replace(volume, modality=modality)


def write(
    array: np.ndarray, affine_ras: np.ndarray, path: Path, *, rescale: tuple[float, float] | None = None, level: int = 6
) -> None:
    """The array as NIfTI-1 (gzipped where the name ends in .gz); sform and qform are the affine; no clock in the bytes.

    NIfTI-1 keeps the affine and the rescale in float32: below 1e-5 mm at 200 mm.
    """
    import nibabel

    image: Any = nibabel.Nifti1Image(np.asfortranarray(array), affine_ras)  # type: ignore[no-untyped-call]
    image.set_sform(affine_ras, code=1)
    image.set_qform(affine_ras, code=1)
    image.header.set_xyzt_units("mm")
    if rescale is not None:
        image.header.set_slope_inter(*rescale)
    if not path.name.endswith(".gz"):
        path.write_bytes(image.to_bytes())
        return
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=level, fileobj=file, mtime=0) as packed:
        packed.write(image.to_bytes())
