"""Job `pathology/tiles`: one part per slide: tissue, quality control, and an index of tiles at an exact mpp.

`params` of the job:
    target_mpp   0.5      µm per pixel of the tiles
    size         256      edge of a tile in pixels of target_mpp
    overlap      0        pixels of target_mpp that neighbours share
    min_tissue   0.25     share of a tile that must be tissue
    max_fold     0.5      share of a tile that may be folded tissue; pen never counts as tissue
    blur         true     measure each tile's sharpness (reads it at half the resolution)
    min_sharp    0.0      tiles less sharp than this are left out (docs/pathology.md shows what the figure means)
    mpp          null     µm per pixel at level 0, where the slides do not say or are wrong

A part's files: `tiles.parquet` (x, y at level 0; tissue, fold, sharpness; in the order in which stored shards are read
once), `tissue.geojson`, `overview.jpg`.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding
from permed_compute.spec import JobSpec
from permed_compute.storage.shards import SIDE
from permed_compute.workloads.pathology import inputs
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "2"
INDEX, CONTOURS, OVERVIEW = "tiles.parquet", "tissue.geojson", "overview.jpg"
_BATCH = 64
_MOST_FIGURES = 24
_MUCH_PEN, _MUCH_FOLD, _BLURRED, _MANY_BLURRED = 0.01, 0.05, 0.02, 0.5
GRID_PARAMS: dict[str, tuple[Any, inputs.Check, str]] = {
    "target_mpp": (0.5, lambda v: inputs.is_number(v, 0.05, 100), "µm per pixel between 0.05 and 100"),
    "size": (256, lambda v: isinstance(v, int) and 16 <= v <= 4096, "a number of pixels from 16 to 4096"),
    "overlap": (0, lambda v: isinstance(v, int) and v >= 0, "a number of pixels"),
    "min_tissue": (0.25, lambda v: inputs.is_number(v, 0, 1), "a share between 0 and 1"),
    "max_fold": (0.5, lambda v: inputs.is_number(v, 0, 1), "a share between 0 and 1"),
    "blur": (True, lambda v: isinstance(v, bool), "true or false"),
    "min_sharp": (0.0, lambda v: inputs.is_number(v, 0, 100), "a number from 0"),
    "mpp": inputs.MPP,
}


@dataclass(frozen=True, slots=True)
class Grid:
    """Tiles at an exact resolution. size, overlap: pixels of `mpp`; step: level-0 pixels between corners, (x, y)."""

    mpp: float
    size: int
    overlap: int
    step: tuple[float, float]
    span: tuple[float, float]
    """Level-0 pixels that a tile covers, (x, y)."""

    @classmethod
    def of(cls, params: Mapping[str, Any], own: tuple[float, float]) -> Grid:
        """Raises `RefusedInput` (OVERLAP) where tiles would not advance."""
        mpp, size, overlap = float(params["target_mpp"]), params["size"], params["overlap"]
        if overlap >= size:
            refuse("OVERLAP", "Tiles that overlap by their own size do not advance.", "Write a smaller overlap.")
        scale = [_whole(mpp / axis) for axis in own]
        return cls(
            mpp, size, overlap, ((size - overlap) * scale[0], (size - overlap) * scale[1]),
            (size * scale[0], size * scale[1]),
        )  # fmt: skip

    def corners(self, width: int, height: int) -> np.ndarray:
        """(n, 2) int64 level-0 (x, y) of every tile that begins inside the slide, row by row."""
        xs = np.round(np.arange(0, width, self.step[0])).astype(np.int64)
        ys = np.round(np.arange(0, height, self.step[1])).astype(np.int64)
        return np.stack([grid.ravel() for grid in np.meshgrid(xs, ys)], 1)


def _whole(scale: float) -> float:
    """A ratio that is a power of two to 0.1 % is one: tiles then fall on the stored levels' pixels."""
    near = 2.0 ** round(np.log2(scale))
    return near if abs(scale / near - 1) < 1e-3 else scale


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return inputs.checked(given, GRID_PARAMS, "pathology/tiles")


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    return inputs.slides(spec, ctx, params_of(spec.params))


def load(part: Part, ctx: Context) -> tuple[Part, Any]:
    return part, inputs.open_part(part, ctx, part.params["mpp"])


def run(data: tuple[Part, Any], model: None, ctx: Context) -> PartResult:
    part, slide = data
    with Reader(slide, threads=ctx.threads) as reader:
        return inputs.named(part, lambda: index(part, reader, ctx))


def index(part: Part, reader: Reader, ctx: Context) -> PartResult:
    """Find tissue, list its tiles and write the part's files. Raises `RefusedInput` (NO_TISSUE)."""
    from permed_compute.workloads.pathology import jpeg, stain, tissue

    params = part.params
    with ctx.stage("tissue"):
        found = tissue.detect(tissue.overview(reader))
    (ctx.out / OVERVIEW).write_bytes(jpeg.encode(tissue.picture(found), 85))
    grid = Grid.of(params, reader.mpp)
    width, height = reader.dimensions
    corners = grid.corners(width, height)
    share = _shares(found.tissue, corners, grid, found.view.scale)
    fold = _shares(found.fold, corners, grid, found.view.scale)
    kept = (share >= max(params["min_tissue"], 1e-6)) & (fold <= params["max_fold"])
    corners, share, fold = corners[kept], share[kept], fold[kept]
    order = _shard_order(corners, reader, grid)
    corners, share, fold = corners[order], share[order], fold[order]
    sharp = np.zeros(len(corners), np.float32)
    if params["blur"]:
        with ctx.stage("blur"):
            sharp = _sharpness(reader, corners, grid)
        keep = sharp >= params["min_sharp"]
        corners, share, fold, sharp = corners[keep], share[keep], fold[keep], sharp[keep]
    if not len(corners):
        refuse("NO_TISSUE", "No tile of the slide has enough tissue.", "Look at the slide; lower min_tissue.",
               **found.shares)  # fmt: skip
    fitted = stain.estimate(found.view.pixels[found.tissue], seed=ctx.seed)
    with ctx.stage("write"):
        polygons = tissue.contours(found)
        tissue.write_geojson(ctx.out / CONTOURS, polygons, "Tissue", {"area_mm2": round(found.area_mm2, 4)})
        facts = {
            "target_mpp": grid.mpp, "patch_size": grid.size, "patch_size_level0": round(grid.span[0]),
            "overlap": grid.overlap, "level0_width": width, "level0_height": height, "slide": part.inputs[0],
            "mpp": list(reader.mpp),
        }  # fmt: skip
        write_index(ctx.out / INDEX, corners, {"tissue": share, "fold": fold, "sharpness": sharp}, facts)
    values = {
        "tiles": len(corners), "area_mm2": round(found.area_mm2, 4), "regions": len(polygons), **found.shares,
        "sharpness_median": round(float(np.median(sharp)), 4), "objective": reader.slide.about.objective,
        "stain": None if fitted is None else {
            "vectors": fitted.vectors.round(4).tolist(), "most": fitted.most.round(4).tolist()
        },
        **facts,
    }  # fmt: skip
    return PartResult(values=values, findings=_findings(values, sharp, params["blur"], part.inputs[0]))


def write_index(path: Path, corners: np.ndarray, columns: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Parquet: x, y (int32, level-0 pixels) and float32 columns; `facts` as JSON in the schema's metadata `permed`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = {"x": corners[:, 0].astype(np.int32), "y": corners[:, 1].astype(np.int32)}
    table = pa.table(data | {name: value.astype(np.float32) for name, value in columns.items()})
    pq.write_table(table.replace_schema_metadata({"permed": json.dumps(facts)}), path, compression="zstd")


def read_index(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(n, 2) int64 level-0 (x, y), and the facts."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    corners = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], 1).astype(np.int64)
    return corners, json.loads(table.schema.metadata[b"permed"])


def _shares(mask: np.ndarray, corners: np.ndarray, grid: Grid, scale: tuple[float, float]) -> np.ndarray:
    """(n,) float32: share of each tile that the mask covers; what lies beyond the slide counts as none."""
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    x0, y0 = corners[:, 0] / scale[0], corners[:, 1] / scale[1]
    x1, y1 = x0 + grid.span[0] / scale[0], y0 + grid.span[1] / scale[1]
    # A view pixel belongs to a tile by its centre; at least one, where tiles are smaller than view pixels.
    left, top = np.floor(x0 + 0.5).astype(int), np.floor(y0 + 0.5).astype(int)
    right, bottom = np.maximum(np.floor(x1 + 0.5).astype(int), left + 1), np.maximum(
        np.floor(y1 + 0.5).astype(int), top + 1)  # fmt: skip
    whole = (right - left) * (bottom - top)
    left, right = (np.clip(v, 0, mask.shape[1]) for v in (left, right))
    top, bottom = (np.clip(v, 0, mask.shape[0]) for v in (top, bottom))
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return np.asarray(inside / whole, np.float32)


def _shard_order(corners: np.ndarray, reader: Reader, grid: Grid) -> np.ndarray:
    """Order in which each shard of the level that is read comes once, its rows top to bottom."""
    level = reader.slide.levels[reader.level_of(grid.mpp)]
    width, height = (SIDE * edge * level.downsample for edge in (level.layout.tile_w, level.layout.tile_h))
    x, y = corners[:, 0], corners[:, 1]
    return np.lexsort((x, y, x // width, y // height))


def _sharpness(reader: Reader, corners: np.ndarray, grid: Grid) -> np.ndarray:
    from permed_compute.workloads.pathology import tissue

    parts = [
        tissue.sharpness(reader.read_many(grid.mpp * 2, corners[k : k + _BATCH], max(8, grid.size // 2)))
        for k in range(0, len(corners), _BATCH)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _findings(values: Mapping[str, Any], sharp: np.ndarray, measured: bool, about: str) -> list[Finding]:
    found = []
    if values["pen_share"] > _MUCH_PEN:
        found.append(Finding("PEN_MARKS", "Ink on the glass; its area is no tissue.", "corrected", about,
                             {"share": values["pen_share"]}))  # fmt: skip
    if values["fold_share"] > _MUCH_FOLD:
        found.append(Finding("FOLDS", "Much of the tissue is folded.", "note", about, {"share": values["fold_share"]}))
    if values["stain"] is None:
        found.append(Finding("NO_STAIN_FIT", "Haematoxylin and eosin could not be told apart.", "note", about))
    blurred = float((sharp < _BLURRED).mean()) if measured and len(sharp) else 0.0
    if blurred > _MANY_BLURRED:
        found.append(Finding("OUT_OF_FOCUS", "Most tiles are blurred.", "note", about, {"share": round(blurred, 3)}))
    return found


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """A table of slides with QC, pictures of the masks, and the indices by slide."""
    done = sorted(results, key=lambda item: item.part.name)
    columns = ("tiles", "area_mm2", "tissue_share", "pen_share", "fold_share", "sharpness_median")
    with (ctx.out / "slides.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["slide", *columns, "findings"])
        for item in done:
            codes = " ".join(finding.code for finding in item.findings)
            table.writerow([item.part.name, *(item.values[column] for column in columns), codes])
    tiles = sum(int(item.values["tiles"]) for item in done)
    return Result(
        values={"parts": {item.part.name: dict(item.values) for item in done}, "tiles": tiles},
        metrics={"slides": float(len(done)), "tiles": float(tiles)},
        figures=pictures(done, ctx),
    )


def pictures(done: Sequence[DonePart], ctx: Context) -> list[tuple[str, str]]:
    """Copies the first slides' pictures beside the page; (name, caption)."""
    figures = []
    for item in done[:_MOST_FIGURES]:
        name = f"{item.part.name}-{OVERVIEW}"
        shutil.copyfile(item.folder / OVERVIEW, ctx.out / name)
        caption = f"Tissue {item.values['area_mm2']:.1f} mm², {item.values['tiles']} tiles ({item.part.name})"
        figures.append((name, caption))
    return figures


WORKLOAD = Map(plan=plan, load=load, run=run, reduce=reduce, version=VERSION)
