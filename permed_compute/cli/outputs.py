"""Which files a job left, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_KNOWN = {
    "index.html": ("page", "the job's page: pictures, numbers, timings, device"),
    "manifest.json": ("manifest", "what ran where and why: spec, versions, digests, device, seed"),
    "result.json": ("result", "values, findings, and every part with its state"),
}
_BY_END = (
    (".nii.gz", ("nifti", "NIfTI volume in the source's geometry")),
    (".nii", ("nifti", "NIfTI volume in the source's geometry")),
    (".png", ("picture", "picture")),
    (".svg", ("picture", "picture")),
    (".csv", ("table", "table")),
    (".parquet", ("table", "table")),
    (".json", ("json", "JSON")),
    (".geojson", ("json", "GeoJSON")),
    (".html", ("page", "HTML page")),
)
_SEG = b"1.2.840.10008.5.1.4.1.1.66.4"  # Segmentation Storage, PS3.4 table B.5-1
_SR = b"1.2.840.10008.5.1.4.1.1.88."  # the family of Structured Reports


@dataclass(frozen=True, slots=True)
class Output:
    """One file below a job's results. `kind` is a word for programs, `what` a phrase for people."""

    path: Path
    kind: str
    what: str
    size: int

    def as_dict(self) -> dict[str, str | int]:
        return {"path": str(self.path), "kind": self.kind, "what": self.what, "bytes": self.size}


def outputs(results: Path) -> list[Output]:
    """Every file, the job's own before the parts'."""
    files = [path for path in results.rglob("*") if path.is_file() and not path.name.startswith(".")]
    files.sort(key=lambda path: (len(path.relative_to(results).parts), path.name not in _KNOWN, str(path)))
    return [Output(path, *_described(path, results), path.stat().st_size) for path in files]


def _described(path: Path, results: Path) -> tuple[str, str]:
    if path.parent == results and path.name in _KNOWN:
        return _KNOWN[path.name]
    for end, said in _BY_END:
        if path.name.endswith(end):
            return said
    with path.open("rb") as file:
        head = file.read(1024)
    if head[128:132] == b"DICM":
        # The file meta information stands first and names the SOP class: no need to load pydicom for it.
        if _SEG in head:
            return "dicom-seg", "DICOM Segmentation"
        return ("dicom-sr", "DICOM Structured Report") if _SR in head else ("dicom", "DICOM")
    return "file", "file"
