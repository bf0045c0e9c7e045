"""Job `pathology/segment`: regions or nuclei of whole slides, without seams, as GeoJSON, OME-Zarr labels, DICOM SEG.

Three rounds of one map: a part per slide (tissue, and what the model measures of a slide), a part per tile that has
tissue, a part per slide that merges its tiles. Tiles of all slides go to the same workers; a finished tile is in the
ledger, so that a kill costs a worker two tiles at most. A slide with a bad tile is not merged; the others are, and the
job ends PARTIAL.

`params` of the job:
    model          nuclei    see `segmenters`; its resolution is the model's
    tile           2048      pixels per part's edge, a multiple of 512; labels do not depend on it
    least_um2      0.0       regions smaller than this are not among the objects (they stay in the label image)
    seg            true      DICOM SEG beside the other results, where the slide is DICOM
    mpp            null      µm per pixel at level 0, where the slides do not say or are wrong

A merged slide's files: `objects.geojson` (QuPath), `labels/<name>` (OME-Zarr), `overview.jpg`, `segmentation.dcm`.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, WorkloadError
from permed_compute.spec import JobSpec, Purpose
from permed_compute.workloads.pathology import inputs, segmenters
from permed_compute.workloads.pathology.labels import CHUNK
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import refuse
from permed_compute.workloads.pathology.tissue import View
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result

VERSION = "1"
MASK, LABELS, OVERVIEW, SEG = "tissue.png", "labels.zst", "overview.jpg", "segmentation.dcm"
_RIM = 2
"""Pixels of the tissue view (8 µm) beyond the tissue that are still looked at: outlines there are rough."""
_MOST_FIGURES = 24
_PARAMS: dict[str, tuple[Any, inputs.Check, str]] = {
    "model": ("nuclei", lambda v: isinstance(v, str | dict), "a name or a mapping"),
    "tile": (2048, lambda v: isinstance(v, int) and 512 <= v <= 8192 and v % CHUNK == 0, "a multiple of 512 to 8192"),
    "least_um2": (0.0, lambda v: inputs.is_number(v, 0, 1e9), "an area in µm²"),
    "seg": (True, lambda v: isinstance(v, bool), "true or false"),
    "mpp": inputs.MPP,
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return inputs.checked(given, _PARAMS, "pathology/segment")


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """Round 1: slides. Round 2: those again (the ledger has them), and tiles. Round 3: all that, and merges."""
    params = params_of(spec.params)
    made = segmenters.recipe(params["model"])
    common = {"mpp": params["mpp"], "tile": params["tile"], "target_mpp": made.mpp}
    slides = inputs.slides(spec, ctx, {"step": "tissue", **common})
    known, whole = state.get("slides", {}), state.get("whole", {})
    tiles = [part for slide in slides if slide.name in known for part in _tiles(slide, known[slide.name], common)]
    merges = [
        _merge(slide, known[slide.name], whole[slide.name], params, spec) for slide in slides if slide.name in whole
    ]
    if known:
        ctx.log(f"{len(tiles)} tiles of {len(known)} slides")
    return [*slides, *tiles, *merges]


def _tiles(slide: Part, known: Mapping[str, Any], common: Mapping[str, Any]) -> list[Part]:
    return [
        Part(
            name=f"{slide.name}-{row:04d}-{column:04d}",
            inputs=(slide.inputs[0], known["mask_digest"]),
            params={
                "step": "tile", "row": row, "column": column, **common, "size": known["size"],
                "scale": known["scale"], "view_scale": known["view_scale"], "facts": known["facts"],
            },
            sources=(slide.sources[0], known["mask"]),
            subject=slide.subject,
        )
        for row, column in known["tiles"]
    ]  # fmt: skip


def _merge(
    slide: Part, known: Mapping[str, Any], tiles: Sequence[Sequence[Any]], params: Mapping[str, Any], spec: JobSpec
) -> Part:
    """tiles: (row, column, digest, file) of those that hold labels."""
    digest = hashlib.sha256("".join(f"{row} {column} {said}\n" for row, column, said, _ in tiles).encode()).hexdigest()
    return Part(
        name=f"{slide.name}-merged",
        inputs=(slide.inputs[0], digest),
        params={
            "step": "merge", "mpp": params["mpp"], "tile": params["tile"], "size": known["size"],
            "scale": known["scale"], "least_um2": params["least_um2"], "seg": params["seg"],
            "purpose": spec.purpose.value, "places": [[row, column] for row, column, _, _ in tiles],
        },
        sources=(slide.sources[0], *(file for *_, file in tiles)),
        subject=slide.subject,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ load


@dataclass(frozen=True)
class Tile:
    """A tile's pixels with what the model must see around them. mask: (tile, tile) bool, where labels may be."""

    part: Part
    box: segmenters.Box
    core: segmenters.Box
    pixels: np.ndarray
    mask: np.ndarray


def load(part: Part, ctx: Context) -> Any:
    if part.params["step"] != "tile":
        return part
    params = part.params
    tile, size, scale = params["tile"], params["size"], params["scale"]
    y0, x0 = params["row"] * tile, params["column"] * tile
    core = (x0, y0, x0 + tile, y0 + tile)
    made = segmenters.recipe(params_of(ctx.spec.params)["model"])
    box = made.needs(core, (size[0], size[1]))
    reader = inputs.READERS.get(part, ctx)
    with ctx.stage("read"):
        edges = box[2] - box[0], box[3] - box[1]
        corner = box[0] * scale[0], box[1] * scale[1]
        pixels = inputs.named(part, lambda: reader.read(made.mpp, *corner, edges))
    return Tile(part, box, core, pixels, _allowed(part, core))


def _allowed(part: Part, core: segmenters.Box) -> np.ndarray:
    """Where the tissue's view, seen from each pixel's middle, has tissue; nothing beyond the slide."""
    mask, params = _mask(part.sources[1], part.inputs[1]), part.params
    x, y = (np.arange(core[k], core[k + 2]) for k in (0, 1))
    at_x, at_y = (
        np.clip((where + 0.5) * params["scale"][k] / params["view_scale"][k], 0, mask.shape[1 - k] - 1).astype(int)
        for k, where in enumerate((x, y))
    )
    inside = (y < params["size"][1])[:, None] & (x < params["size"][0])[None]
    return np.asarray(mask[at_y[:, None], at_x[None]] & inside)


@lru_cache(maxsize=4)
def _mask(file: str, digest: str) -> np.ndarray:
    """digest: of the file, so that another one of that name is not taken for it."""
    from PIL import Image

    if not Path(file).is_file():
        raise WorkloadError("The slide's tissue mask is gone.", remedy="Submit the job again: it plans anew.")
    Image.MAX_IMAGE_PIXELS = None  # our own file
    with Image.open(file) as image:
        return np.asarray(image.convert("1"))


# ------------------------------------------------------------------------------------------------ run


def run(data: Any, model: segmenters.Segmenter, ctx: Context) -> PartResult:
    if isinstance(data, Tile):
        return _segmented(data, model, ctx)
    if data.params["step"] == "merge":
        return _merged(data, ctx)
    with Reader(inputs.open_part(data, ctx, data.params["mpp"]), threads=ctx.threads) as reader:
        return inputs.named(data, lambda: _looked_at(data, reader, model, ctx))


def _looked_at(part: Part, reader: Reader, model: segmenters.Segmenter, ctx: Context) -> PartResult:
    """Tissue, the tiles that have some, and what the model measures of the slide."""
    from PIL import Image
    from scipy import ndimage

    from permed_compute.workloads.pathology import jpeg, tissue

    with ctx.stage("tissue"):
        found = tissue.detect(tissue.overview(reader))
    if not found.tissue.any():
        refuse("NO_TISSUE", "The slide has no tissue.", "Look at the slide.", **found.shares)
    scale = reader.scale(part.params["target_mpp"])
    size = [-(-length // each) for length, each in zip(reader.dimensions, scale, strict=True)]
    mask = ndimage.binary_dilation(found.tissue, iterations=_RIM)
    with ctx.stage("measure"):
        facts = model.measure(reader, found, ctx.seed)
    Image.fromarray(mask).convert("1").save(ctx.out / MASK)
    (ctx.out / OVERVIEW).write_bytes(jpeg.encode(tissue.picture(found), 85))
    return PartResult({
        "size": [int(length) for length in size], "scale": list(scale), "view_scale": list(found.view.scale),
        "tiles": _with_tissue(mask, found.view, scale, part.params["tile"], size), "facts": facts,
        "mask_digest": hashlib.sha256((ctx.out / MASK).read_bytes()).hexdigest(),
        "area_mm2": round(found.area_mm2, 4),
    })  # fmt: skip


def _with_tissue(
    mask: np.ndarray, view: View, scale: tuple[float, float], tile: int, size: Sequence[float]
) -> list[list[int]]:
    """[row, column] of the tiles under the mask, in order."""
    ys, xs = np.nonzero(mask)
    places: list[np.ndarray] = []
    for places_of, k in ((ys, 1), (xs, 0)):
        step = view.scale[k] / (scale[k] * tile)
        last = int(-(-size[k] // tile)) - 1
        ends = [np.minimum(((places_of + add) * step).astype(int), last) for add in (0, 1 - 1e-9)]
        places.append(np.stack(ends))
    pairs = [np.stack([places[0][a], places[1][b]], 1) for a in (0, 1) for b in (0, 1)]
    listed: list[list[int]] = np.unique(np.concatenate(pairs), axis=0).tolist()
    return listed


def _segmented(data: Tile, model: segmenters.Segmenter, ctx: Context) -> PartResult:
    from permed_compute.workloads.pathology import merge

    made, size = segmenters.recipe(params_of(ctx.spec.params)["model"]), data.part.params["size"]
    cut = 0
    with ctx.stage("segment"):
        labels = model.labels(data.pixels, data.box, data.core, (size[0], size[1]), data.part.params["facts"])
    if made.gives == "classes":
        labels = np.where(data.mask, labels, 0).astype(np.uint8)
    else:
        labels, cut = merge.owned(_on_slide(labels, data.box, size), made.halo)
        labels = _where_allowed(labels, data.mask, made.halo)
    values: dict[str, Any] = {"row": data.part.params["row"], "column": data.part.params["column"], "cut": cut}
    if not labels.any():
        return PartResult({**values, "digest": ""})
    with ctx.stage("write"):
        merge.store(ctx.out / LABELS, labels)
    return PartResult({**values, "digest": hashlib.sha256((ctx.out / LABELS).read_bytes()).hexdigest()})


def _on_slide(labels: np.ndarray, box: segmenters.Box, size: Sequence[int]) -> np.ndarray:
    """Labels of objects, without what lies beyond the slide."""
    x, y = np.arange(box[0], box[2]), np.arange(box[1], box[3])
    inside = ((y >= 0) & (y < size[1]))[:, None] & ((x >= 0) & (x < size[0]))[None]
    return np.where(inside, labels, 0)


def _where_allowed(labels: np.ndarray, mask: np.ndarray, halo: int) -> np.ndarray:
    """Labels of objects that touch the tissue within the tile; they are kept or dropped whole."""
    core = labels[halo : len(labels) - halo, halo : len(labels) - halo]
    keep = np.zeros(int(labels.max(initial=0)) + 1, bool)
    keep[np.unique(core[mask])] = True
    keep[0] = False
    return np.where(keep[labels], labels, 0).astype(np.uint32)


def _merged(part: Part, ctx: Context) -> PartResult:
    from permed_compute.workloads.pathology import merge

    params = part.params
    made = segmenters.recipe(params_of(ctx.spec.params)["model"])
    frame = merge.Frame(
        params["tile"], made.halo, (params["size"][0], params["size"][1]), (params["scale"][0], params["scale"][1]),
        made.mpp, made.name.replace(":", "-").replace("/", "-"), made.classes, params["least_um2"],
    )  # fmt: skip
    places = {(row, column): Path(file) for (row, column), file in
              zip(params["places"], part.sources[1:], strict=True)}  # fmt: skip
    if any(not file.is_file() for file in places.values()):
        raise WorkloadError("A tile's labels are gone.", remedy="Submit the job again: it plans anew.")
    with ctx.stage("merge"):
        if made.gives == "classes":
            values = merge.regions(frame, places, ctx.out, ctx.scratch)
        else:
            values = merge.instances(frame, places, ctx.out)
    findings: list[Finding] = []
    with Reader(inputs.open_part(part, ctx, params["mpp"]), threads=ctx.threads) as reader, ctx.stage("write"):
        (ctx.out / OVERVIEW).write_bytes(_picture(reader, frame, ctx.out))
        if params["seg"] and reader.slide.about.kind == "dicom-wsi":
            findings += _seg(reader.slide.file, frame, made, part, ctx)
    return PartResult({**values, "mpp": made.mpp, "size": params["size"]}, findings)


def _picture(reader: Reader, frame: Any, out: Path) -> bytes:
    """The slide with its labels over it, at most 640 pixels wide or high."""
    from permed_compute.workloads.pathology import jpeg, labels

    level, step = labels.thinned(out, frame.name, 640)
    height, width = level.shape
    pixels = reader.read(frame.mpp * step, 0, 0, (width, height)).astype(np.float32)
    shown = level if len(frame.classes) > 1 else (level > 0).astype(np.uint8)
    for item in frame.classes:
        pixels[shown == item.value] = 0.3 * pixels[shown == item.value] + 0.7 * np.array(item.colour)
    return jpeg.encode(np.ascontiguousarray(pixels.astype(np.uint8)), 85)


def _seg(file: Path, frame: Any, made: segmenters.Recipe, part: Part, ctx: Context) -> list[Finding]:
    from permed_compute.workloads.pathology import slide_seg

    purpose = Purpose(part.params["purpose"])
    return slide_seg.write(file, frame, made, ctx.out, SEG, purpose, VERSION, part.inputs[0])


# ------------------------------------------------------------------------------------------------ reduce and model


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    by_step: dict[str, list[DonePart]] = {"tissue": [], "tile": [], "merge": []}
    for item in sorted(results, key=lambda item: item.part.name):
        by_step[item.part.params["step"]].append(item)
    if not state:
        names = ("size", "scale", "view_scale", "tiles", "facts", "mask_digest")
        return Next({"slides": {
            item.part.name: {**{name: item.values[name] for name in names}, "mask": str(item.folder / MASK)}
            for item in by_step["tissue"]
        }})  # fmt: skip
    tiles: dict[str, list[DonePart]] = {name: [] for name in state["slides"]}
    for item in by_step["tile"]:
        tiles[item.part.name.rsplit("-", 2)[0]].append(item)
    whole = {name: found for name, found in tiles.items() if len(found) == len(state["slides"][name]["tiles"])}
    if "whole" not in state:
        return Next({**state, "whole": {name: _labelled(found) for name, found in whole.items()}})
    for item in by_step["tissue"]:
        name = item.part.name
        if name not in whole:
            numbers = {"tiles": len(state["slides"][name]["tiles"]), "segmented": len(tiles[name])}
            sentence = "Tiles of the slide failed; it has no segmentation."
            ctx.finding(Finding("SLIDE_INCOMPLETE", sentence, "refused", item.part.inputs[0], numbers))
            continue
        cut = sum(int(each.values["cut"]) for each in whole[name])
        if cut:
            sentence = "Objects are larger than the halo between tiles; they were cut."
            ctx.finding(Finding("OBJECTS_CUT", sentence, "note", item.part.inputs[0], {"objects": cut}))
    return _result(by_step["merge"], ctx)


def _labelled(found: Sequence[DonePart]) -> list[list[Any]]:
    return [
        [item.values["row"], item.values["column"], item.values["digest"], str(item.folder / LABELS)]
        for item in found
        if item.values["digest"]
    ]


def _result(merged: Sequence[DonePart], ctx: Context) -> Result:
    """A table of objects and areas by class, and the pictures."""
    rows: list[tuple[Any, ...]] = []
    figures: list[tuple[str, str]] = []
    for item in merged:
        name = item.part.name.removesuffix("-merged")
        rows += [
            (name, label, said["objects"], said["area_mm2"], f"parts/{item.part.name}")
            for label, said in item.values["classes"].items()
        ]
        if len(figures) < _MOST_FIGURES:
            picture = f"{name}-{OVERVIEW}"
            shutil.copyfile(item.folder / OVERVIEW, ctx.out / picture)
            figures.append((picture, f"{item.values['objects']} objects ({name})"))
    with (ctx.out / "objects.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("slide", "class", "objects", "area_mm2", "files"), *rows])
    made = segmenters.recipe(params_of(ctx.spec.params)["model"])
    total = sum(int(item.values["objects"]) for item in merged)
    return Result(
        values={
            "model": made.name, "model_digest": made.digest, "slides": len(merged), "objects": total,
            "parts": {item.part.name: dict(item.values) for item in merged},
        },
        metrics={"slides": float(len(merged)), "objects": float(total)},
        figures=figures,
    )  # fmt: skip


def load_model(spec: JobSpec, ctx: Context) -> segmenters.Segmenter:
    with ctx.stage("load model"):
        made = segmenters.recipe(params_of(spec.params)["model"])
        return segmenters.load(made, ctx.device, ctx.threads, ctx.scratch)


def model_digest(spec: JobSpec, ctx: Context) -> str:
    made = segmenters.recipe(params_of(spec.params)["model"])
    # What a user's function computes is not known by its file alone: for care it says no model, and is refused.
    return "" if made.kind == "callable" and spec.purpose is Purpose.CARE else made.digest


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, run=run, reduce=reduce, model_digest=model_digest, version=VERSION
)
