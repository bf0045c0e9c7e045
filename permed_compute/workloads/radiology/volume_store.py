"""The volume store: one Zarr v3 array per volume, `storage.volumes`, which says where it lies and what it was made of.

    <name>.zarr/zarr.json     attributes `permed`: affine, spacing, orientation, rescale, sources, findings …
    <name>.zarr/c.0.0.0 …     shards

Array index (i, j, k) is NIfTI's and MONAI's: `affine_ras` takes it to mm. Values are `stored × slope + intercept`, and
equal to what `read.assemble` or `nifti.read` gives to the last bit. A store is made beside its place and renamed: one
that exists is whole.
"""

from __future__ import annotations

import secrets
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from permed_compute import __version__
from permed_compute.errors import Finding, RefusedInput
from permed_compute.storage import volumes
from permed_compute.storage.volumes import CHUNK, Layout, VolumeReader
from permed_compute.workloads.radiology import geometry, nifti
from permed_compute.workloads.radiology.read import Volume

SUFFIX = ".zarr"
Kind = Literal["image", "label"]
Rescale = tuple[float, float]
"""(slope, intercept)."""

ACQUISITION = (
    "Modality", "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "BodyPartExamined", "SliceThickness",
    "KVP", "ConvolutionKernel", "ReconstructionDiameter", "ContrastBolusRoute", "MagneticFieldStrength",
    "ScanningSequence", "SequenceVariant", "MRAcquisitionType", "RepetitionTime", "EchoTime", "InversionTime",
    "FlipAngle", "EchoTrainLength", "Units", "DecayCorrection", "CorrectedImage", "ReconstructionMethod",
    "PatientPosition", "LossyImageCompression", "LossyImageCompressionRatio",
)  # fmt: skip
"""What a store keeps of a DICOM header: how the picture was made; nothing about whom, when or where."""


class VolumeStore(VolumeReader):
    """A finished store. `about` is what `write` said of it. Raises `RefusedInput` (NOT_OUR_STORE)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        about = self.attributes.get("permed", {})
        if "affine_ras" not in about:
            finding = Finding("NOT_OUR_STORE", "The Zarr array is not a volume store.", "refused")
            raise RefusedInput(finding, remedy="`permed convert` makes one.")
        self.about: Mapping[str, Any] = about
        self.affine_ras = np.array(about["affine_ras"])
        self.rescale: Rescale | None = tuple(about["rescale"]) if about["rescale"] else None

    @property
    def digest(self) -> str:
        """Of its source: of the file, or over the sorted digests of its files."""
        return str(self.about["source"])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along i, j, k."""
        i, j, k = self.about["spacing_mm"]
        return i, j, k

    def values(self, start: Sequence[int], size: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """A box in modality units; see `VolumeReader.read`."""
        if self.rescale is None:
            return self.read(start, size, np.empty(tuple(size), dtype))
        return rescaled(self.read(start, size), self.rescale).astype(dtype, copy=False)

    def volume(self) -> Volume:
        """The whole of it. `slices` is empty and `header` None: those are the source's."""
        array = self.all()
        if self.rescale is not None:
            array = rescaled(array, self.rescale)
        return Volume(
            array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine_ras, (), None, self.digest, self.about["modality"]
        )

    @cached_property
    def class_chunks(self) -> Mapping[int, Sequence[Sequence[int]]]:
        """Of a label: per class, [chunk number, voxels] of the chunks that hold it (`label_chunks`)."""
        return {int(name): rows for name, rows in self.about.get("classes", {}).items()}

    def checksum(self) -> str:
        """Of the stored voxels as they are now; `about["voxels"]` says what they were."""
        return _checksum(self.all())


def rescaled(stored: np.ndarray, rescale: Rescale) -> np.ndarray:
    """float32 modality values; the product is taken in float64, as `read` takes it."""
    slope, intercept = rescale
    return (stored * np.float64(slope) + intercept).astype(np.float32)


# ------------------------------------------------------------------------------------------------ writing


def packed(array: np.ndarray, hint: Rescale | None = None) -> tuple[np.ndarray, Rescale | None]:
    """The array as int16, with the rescale that gives its values back to the bit; float32 as it is where none does.

    hint: slope and intercept that the source declares for all its voxels.
    """
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if np.isfinite([low, high]).all() and high - low <= 65535:
        whole = np.issubdtype(array.dtype, np.integer) or bool((array == np.rint(array)).all())
        if whole and low >= -32768 and high <= 32767:
            return array.astype(np.int16, copy=False), None
        if whole:
            middle = float(np.floor(low)) + 32768
            return (array.astype(np.float64) - middle).astype(np.int16), (1.0, middle)
    if np.issubdtype(array.dtype, np.integer):
        return array, None
    if hint is not None and hint[0]:
        found = _unscaled(array, hint)
        if found is not None:
            return found
    return array.astype(np.float32, copy=False), None


def _unscaled(array: np.ndarray, hint: Rescale) -> tuple[np.ndarray, Rescale] | None:
    slope, intercept = hint
    stored = np.rint((array.astype(np.float64) - intercept) / slope)
    if not np.isfinite(stored).all():
        return None
    low, high = stored.min(), stored.max()
    shift = 0.0 if low >= -32768 and high <= 32767 else low + 32768
    if high - shift > 32767:
        return None
    small = (stored - shift).astype(np.int16)
    rescale = (slope, intercept + shift * slope)
    return (small, rescale) if np.array_equal(rescaled(small, rescale), array) else None


def darkest(array: np.ndarray) -> int | float:
    """The least value: what stands for outside the volume; 0 where there are values that are no numbers."""
    least = array.min()
    return least.item() if np.isfinite(least) else 0


def as_label(array: np.ndarray, about: str) -> np.ndarray:
    """uint8 or int16 classes. Raises `RefusedInput` LABEL_NOT_WHOLE."""
    low, high = float(array.min()), float(array.max())
    if not (array == np.rint(array)).all() or low < 0 or high > 32767:
        geometry.refuse(
            "LABEL_NOT_WHOLE", f"A label's values must be whole numbers from 0 to 32767; these run from {low:g} to"
            f" {high:g}.", about, "Check that the file is the label, not the image.", least=low, most=high,
        )  # fmt: skip
    return array.astype(np.uint8 if high <= 255 else np.int16)


def label_chunks(label: np.ndarray) -> dict[str, list[list[int]]]:
    """Per class above 0: [chunk number, voxels of the class in it]; chunks of 32³ are numbered in C order."""
    grid = [-(-n // CHUNK) for n in label.shape]
    found: dict[str, list[list[int]]] = {}
    for number, place in enumerate(np.ndindex(*grid)):
        x, y, z = (at * CHUNK for at in place)
        part = label[x : x + CHUNK, y : y + CHUNK, z : z + CHUNK]
        if not part.any():
            continue
        classes, counts = np.unique(part, return_counts=True)
        for one, count in zip(classes.tolist(), counts.tolist(), strict=True):
            if one:
                found.setdefault(str(one), []).append([number, count])
    return found


def write(
    path: Path,
    volume: Volume,
    *,
    inputs: Sequence[str],
    how: Mapping[str, Any] | None = None,
    kind: Kind = "image",
    rescale: Rescale | None = None,
    unit: str = "",
    subject: str = "",
    threads: int = 1,
) -> dict[str, Any]:
    """Make the store of `volume`, or keep that of the same source. Returns {"bytes": …, "files": …, "about": …}.

    inputs: digests of the files. how: options that decide the voxels (JSON). rescale: slope and intercept that the
    source declares for all voxels. subject: a pseudonym. Raises `RefusedInput` LABEL_NOT_WHOLE, OTHER_STORE.
    """
    there = finished(path, volume.series, how)
    if there is not None:
        return there
    if kind == "label":
        array, rescale = as_label(volume.array, volume.series), None
    else:
        array, rescale = packed(volume.array, rescale)
    about = {
        "kind": kind, "shape": list(array.shape), "affine_ras": volume.affine_ras.tolist(),
        "spacing_mm": list(volume.spacing), "orientation": orientation(volume.affine_ras),
        "rescale": list(rescale) if rescale else None, "unit": unit, "modality": volume.modality,
        "acquisition": acquisition(volume.header), "source": volume.series, "inputs": list(inputs),
        "how": dict(how or {}), "subject": subject, "findings": [finding.as_dict() for finding in volume.findings],
        "voxels": _checksum(array), "converter": f"permed_compute {__version__}",
    }  # fmt: skip
    if kind == "label":
        about["classes"] = label_chunks(array)
    # Around a body lies air: its chunks are not stored.
    fill = 0 if kind == "label" else array.max().item() if rescale and rescale[0] < 0 else darkest(array)
    layout = Layout(array.shape, str(array.dtype), fill)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_abandoned(path)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fresh.mkdir(mode=0o700)
    try:
        told = volumes.write(fresh, array, layout, {"permed": about}, threads=threads)
        fresh.rename(path)
    except OSError:
        there = finished(path, volume.series, how)  # another writer was first
        if there is None:
            raise
        return there
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return {**told, "about": about}


_ABANDONED_S = 3600.0


def _remove_abandoned(path: Path) -> None:
    """What a killed writer of this store left beside it; a younger one may belong to a writer that is alive."""
    for left in path.parent.glob(f".{path.name}.*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def write_nifti(store: VolumeStore, path: Path) -> None:
    """The stored integers as NIfTI-1, with their rescale in its header."""
    nifti.write(store.all(), store.affine_ras, path, rescale=store.rescale)


def finished(path: Path, source: str, how: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What `write` told of the store at `path`, None where there is none. Raises `RefusedInput` (OTHER_STORE)."""
    if not path.exists():
        return None
    store = VolumeStore(path)
    if store.digest != source or store.about["how"] != dict(how or {}):
        sentence = "The folder holds the store of another volume, or one made with other options."
        raise RefusedInput(Finding("OTHER_STORE", sentence, "refused", source), remedy="Remove it, or give another.")
    files = list(path.iterdir())
    size = sum(file.stat().st_size for file in files if file.name != "zarr.json")
    return {"bytes": size, "files": len(files) + 1, "about": store.about}


def orientation(affine_ras: np.ndarray) -> str:
    """Where the axes run, nearest: 'LPS' for i to the left, j to the back, k to the head."""
    from nibabel.orientations import aff2axcodes

    return "".join(str(code) for code in aff2axcodes(affine_ras))  # type: ignore[no-untyped-call]


def acquisition(header: Any) -> dict[str, Any]:
    """The attributes of `ACQUISITION` that the header has, as JSON."""
    if header is None:
        return {}
    return {name: _plain(header.get(name)) for name in ACQUISITION if header.get(name) not in (None, "")}


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        return float(value) if isinstance(value, (int, float)) else str(value)
    return [_plain(item) for item in value]


def _checksum(array: np.ndarray) -> str:
    # x fastest: that is how DICOM and NIfTI lie in memory, so nothing is turned round.
    return f"crc32:{zlib.crc32(np.ascontiguousarray(array.T).data):08x}"
