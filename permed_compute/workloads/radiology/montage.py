"""The picture for quality control as DICOM: a multi-slice montage with the outlines, as a secondary capture.

It holds no text at all, so it may say BurnedInAnnotation NO; what it shows, and that it is research, stands in its
header.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.spec import Purpose
from permed_compute.workloads.dicomresult import (
    MANUFACTURER,
    copy_patient_and_study,
    derived_uid,
    series_number,
    settle,
)
from permed_compute.workloads.radiology.outputs import Algorithm, sources
from permed_compute.workloads.radiology.read import Volume

COLUMNS, ROWS = 5, 4
TILE = 240
"""Pixels of a tile's longer side."""
_COLOURS = np.array([(255, 90, 54), (64, 180, 255), (255, 214, 10), (92, 219, 128), (214, 120, 255)], dtype=np.uint8)


def montage(mask: np.ndarray, volume: Volume) -> np.ndarray:
    """(height, width, 3) uint8: axial cuts through the mask (all of it where it is empty), outlines in colour.

    As radiologists look: patient's right on the left, front up, head first.
    """
    grey, labels = volume.to_ras(volume.array), volume.to_ras(mask).astype(np.int32)
    marked = np.flatnonzero(labels.any(axis=(0, 1)))
    first, last = (marked[0], marked[-1]) if len(marked) else (0, grey.shape[2] - 1)
    cuts = np.unique(np.linspace(last, first, COLUMNS * ROWS).round().astype(int))[::-1]
    low, high = np.percentile(grey[::4, ::4], (1, 99.5))
    width, height, _ = (length * step for length, step in zip(grey.shape, volume.spacing_ras, strict=True))
    scale = TILE / max(width, height)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    columns = min(COLUMNS, len(cuts))
    canvas = np.zeros((-(-len(cuts) // columns) * shape[0], columns * shape[1], 3), dtype=np.uint8)
    for place, k in enumerate(cuts):
        top, left = place // columns * shape[0], place % columns * shape[1]
        canvas[top : top + shape[0], left : left + shape[1]] = _tile(grey[:, :, k], labels[:, :, k], shape, low, high)
    return canvas


def _tile(grey: np.ndarray, labels: np.ndarray, shape: tuple[int, int], low: float, high: float) -> np.ndarray:
    """One cut, (x, y) in RAS, as a picture of that shape: rows from front to back, columns from right to left."""
    rows = ((np.arange(shape[0]) + 0.5) * grey.shape[1] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * grey.shape[0] / shape[1]).astype(int)
    at = np.ix_(columns, rows)
    seen = grey[::-1, ::-1][at].T.astype(np.float32)
    marks = labels[::-1, ::-1][at].T
    bright = np.clip((seen - low) / max(high - low, 1e-6), 0, 1) * 255
    picture = np.repeat(bright.astype(np.uint8)[:, :, None], 3, axis=2)
    edge = _edges(marks)
    picture[edge] = _COLOURS[(marks[edge] - 1) % len(_COLOURS)]
    return picture


def _edges(marks: np.ndarray) -> np.ndarray:
    """Pixels of a label that touch another one, or nothing."""
    padded = np.pad(marks, 1)
    inner = np.ones(marks.shape, dtype=bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        inner &= padded[rows : rows + marks.shape[0], columns : columns + marks.shape[1]] == marks
    return np.asarray((marks > 0) & ~inner)


def write_thumbnail(picture: np.ndarray, path: Path, width: int) -> None:
    """The picture as a JPEG of at most that width, without metadata."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((width, 4 * width))
    image.save(path, format="JPEG", quality=80)


def write_montage(picture: np.ndarray, volume: Volume, path: Path, algorithm: Algorithm, purpose: Purpose) -> None:
    """`picture` (height, width, 3) uint8 as a secondary capture (PS3.3 A.8.1), a new series in the source's study."""
    from highdicom.sc import SCImage

    key = algorithm.key(volume, purpose)
    header: Any = sources(volume)[0]
    capture = SCImage(
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=header.StudyInstanceUID,
        series_instance_uid=derived_uid("montage-series", *key),
        series_number=series_number(volume.header, 3),
        sop_instance_uid=derived_uid("montage-instance", *key),
        instance_number=1,
        manufacturer=MANUFACTURER,
        patient_orientation=("L", "P"),
    )
    capture.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    capture.BurnedInAnnotation = "NO"
    capture.Laterality = ""
    capture.SeriesDescription = algorithm.described("quality control", purpose)
    capture.DerivationDescription = f"{algorithm.label} outlines by {algorithm.name} {algorithm.version}"
    capture.SoftwareVersions = algorithm.version
    copy_patient_and_study(capture, volume.header)
    settle(capture, volume.header)
    for keyword in ("DateOfSecondaryCapture", "TimeOfSecondaryCapture"):
        if keyword in capture:
            delattr(capture, keyword)
    capture.save_as(path, enforce_file_format=True)
