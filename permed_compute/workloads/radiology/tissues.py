"""Grey and white matter of the MNI152 average as a data set of one subject: for a fit, and for nothing else.

    python -m permed_compute.workloads.radiology.tissues FOLDER

T1 and the probability maps of both tissues are those that the `nilearn` wheel ships (ICBM 152 non-linear symmetric
2009a, 1 mm). A voxel is of the likelier tissue where that is at least as likely as not. One subject, averaged over 152:
nothing can be held out, so that a training on it must be told to (`validation: 0`, `test: 0`) and calls itself a fit.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import NotFoundError
from permed_compute.paths import write_json
from permed_compute.workloads.radiology import nifti

LABELS = {"1": "grey matter", "2": "white matter"}
_FILES = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def write(folder: Path, *, step: int = 1) -> Path:
    """The scan and its labels as NIfTI with a Decathlon list beside them, which is returned. step: every n-th voxel.

    Raises `NotFoundError` where nilearn is not installed.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.origin:
        raise NotFoundError("nilearn is not installed.", remedy="pip install 'permed-compute[demo]'")
    maps = {name: _read(Path(spec.origin).parent / _FILES.format(name)) for name in ("t1", "gm", "wm")}
    image, affine = maps["t1"]
    likely = np.stack([maps[name][0] / maps[name][0].max() for name in ("gm", "wm")])
    label = np.where(likely.max(axis=0) >= 0.5, 1 + likely.argmax(axis=0), 0).astype(np.uint8)
    scaled = np.rint(image / image.max() * 1000).astype(np.int16)
    every = (slice(None, None, step),) * 3
    affine = affine @ np.diag([step, step, step, 1.0])
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    nifti.write(np.ascontiguousarray(scaled[every]), affine, folder / "t1.nii.gz")
    nifti.write(np.ascontiguousarray(label[every]), affine, folder / "tissues.nii.gz")
    row = {"image": "t1.nii.gz", "label": "tissues.nii.gz", "subject": "mni152"}
    write_json(folder / "dataset.json", {"name": "MNI152 tissues", "labels": {"0": "background", **LABELS},
               "training": [row]})  # fmt: skip
    return folder / "dataset.json"


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel

    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj, np.float32), np.asarray(image.affine)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grey and white matter of the MNI152 average, as a data set.")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    write(given.folder)


if __name__ == "__main__":
    main()
