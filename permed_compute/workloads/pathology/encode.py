"""Job `pathology/encode`: features of the tissue tiles of slides, block by block.

Two rounds of one map: first a part per slide (tissue and tile index, as `pathology/tiles`), then a part per block of up
to `block` tiles. Blocks of all slides go to the same workers, so that an encoder never waits for a slide to end; a
finished block is in the ledger, so that a kill costs a worker the features of two blocks at most: one that is being
published and one that is being encoded. A slide with a bad block has no features; the others do, and the job ends
PARTIAL.

`params` of the job, beside those of `pathology/tiles` (size is 224 here, blur false):
    encoder   efficientnet-lite0   see `encoders`
    block     512                  tiles per part, fewer where they are large: a kill costs a worker two parts at most
    stain     none                 macenko: every slide's stain is brought to the reference's
    exports   []                   of each slide: h5 (TRIDENT's layout), anndata
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from permed_compute.errors import Finding, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.workloads.pathology import encoders, features, inputs, tiles
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result

VERSION = "2"
_MOST_BYTES = 160 << 20
"""Of a block's pixels: two of them are in memory at a time."""
_EXPORTS = {"h5": (features.export_h5, ".h5"), "anndata": (features.export_anndata, ".h5ad")}
_PARAMS = tiles.GRID_PARAMS | {
    "size": (224, tiles.GRID_PARAMS["size"][1], tiles.GRID_PARAMS["size"][2]),
    "blur": (False, tiles.GRID_PARAMS["blur"][1], tiles.GRID_PARAMS["blur"][2]),
    "encoder": ("efficientnet-lite0", lambda v: isinstance(v, str | dict), "a name or a mapping"),
    "block": (512, lambda v: isinstance(v, int) and 1 <= v <= 65536, "a number of tiles"),
    "stain": ("none", lambda v: v in ("none", "macenko"), "none or macenko"),
    "exports": ([], lambda v: isinstance(v, list | tuple) and set(v) <= set(_EXPORTS), f"a list of {list(_EXPORTS)}"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return inputs.checked(given, _PARAMS, "pathology/encode")


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """Round 1: a part per slide. Round 2: those again (the ledger has them, and which were refused), and the blocks."""
    params = params_of(spec.params)
    grid = {name: params[name] for name in tiles.GRID_PARAMS}
    slides = inputs.slides(spec, ctx, {"step": "tiles", **grid})
    if not state:
        return slides
    known = state["slides"]
    blocks = [block for part in slides if part.name in known for block in _blocks(part, known[part.name], params)]
    ctx.log(f"{len(blocks)} blocks of {len(known)} slides")
    return [*slides, *blocks]


def _blocks(slide: Part, known: Mapping[str, Any], params: Mapping[str, Any]) -> list[Part]:
    size = block_size(params)
    stain = known["stain"] if params["stain"] == "macenko" else None
    return [
        Part(
            name=f"{slide.name}-{number:05d}",
            inputs=(slide.inputs[0], known["index_digest"]),
            params={
                "step": "encode", "first": number * size, "block": size, "size": params["size"],
                "target_mpp": params["target_mpp"], "mpp": params["mpp"], "stain": stain,
            },
            sources=(slide.sources[0], known["index"]),
            subject=slide.subject,
        )
        for number in range(-(-known["tiles"] // size))
    ]  # fmt: skip


def block_size(params: Mapping[str, Any]) -> int:
    most: int = _MOST_BYTES // (3 * params["size"] ** 2)
    return max(1, min(int(params["block"]), most))


# ------------------------------------------------------------------------------------------------ load and run


@dataclass(frozen=True)
class Block:
    """Decoded tiles of one block: (n, size, size, 3) uint8."""

    part: Part
    pixels: np.ndarray


@lru_cache(maxsize=8)
def _corners(index: str, digest: str) -> np.ndarray:
    """Of the slide's tiles. `digest`: of the index, so that another one of that name is not taken for it."""
    if not Path(index).is_file():
        raise WorkloadError("The slide's tile index is gone.", remedy="Submit the job again: it plans anew.")
    return tiles.read_index(Path(index))[0]


class _Desk:
    """Where one worker reads its blocks.

    Its two parts take turns: two that decode at once on the cores of one lose a third. Their pixels lie in memory that
    is used again: fresh pages for every block cost a tenth.
    """

    def __init__(self) -> None:
        self.turn = Lock()
        self._free: deque[np.ndarray] = deque(maxlen=2)

    def lend(self, *shape: int) -> np.ndarray:
        """An array of that shape, with whatever it holds."""
        size = math.prod(shape)
        try:
            flat = self._free.pop()
        except IndexError:
            flat = np.empty(0, np.uint8)
        return (flat if flat.size >= size else np.empty(size, np.uint8))[:size].reshape(shape)

    def give_back(self, pixels: np.ndarray) -> None:
        if isinstance(pixels.base, np.ndarray):
            self._free.append(pixels.base)


@lru_cache(maxsize=4)
def _desk(scratch: Path) -> _Desk:
    """The worker's, by its scratch folder: threads of one process may be several workers."""
    return _Desk()


def load(part: Part, ctx: Context) -> Any:
    if part.params["step"] == "tiles":
        return tiles.load(part, ctx)
    corners = _corners(part.sources[1], part.inputs[1])
    first = part.params["first"]
    reader = inputs.READERS.get(part, ctx)
    places, size, desk = corners[first : first + part.params["block"]], part.params["size"], _desk(ctx.scratch)
    with desk.turn, ctx.stage("read"):
        pixels = desk.lend(len(places), size, size, 3)
        inputs.named(part, lambda: reader.read_many(part.params["target_mpp"], places, size, pixels))
    return Block(part, pixels)


def run(data: Any, model: Any, ctx: Context) -> PartResult:
    if not isinstance(data, Block):
        found = tiles.run(data, None, ctx)
        digest = hashlib.sha256((ctx.out / tiles.INDEX).read_bytes()).hexdigest()
        return PartResult({**found.values, "index_digest": digest}, found.findings)
    matrix = _matrix(data.part.params["stain"])
    with ctx.stage("encode"):
        made = model.encode(data.pixels, matrix)
    _desk(ctx.scratch).give_back(data.pixels)
    with ctx.stage("write"):
        features.write_chunk(ctx.out, made, data.part.params["block"])
    return PartResult({"tiles": len(made), "dim": int(made.shape[1]), "first": data.part.params["first"]})


def _matrix(row: Mapping[str, Any] | None) -> np.ndarray | None:
    if row is None:
        return None
    from permed_compute.workloads.pathology.stain import Stain

    return Stain(np.array(row["vectors"]), np.array(row["most"])).matrix()


# ------------------------------------------------------------------------------------------------ reduce and model


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    slides = sorted((item for item in results if item.part.params["step"] == "tiles"), key=lambda i: i.part.name)
    if not state:
        return Next({"slides": {
            item.part.name: {
                "index": str(item.folder / tiles.INDEX), "index_digest": item.values["index_digest"],
                "tiles": item.values["tiles"], "stain": item.values["stain"],
            }
            for item in slides
        }})  # fmt: skip
    params = params_of(ctx.spec.params)
    made = encoders.recipe(params["encoder"])
    blocks: dict[str, list[DonePart]] = {}
    for item in results:
        if item.part.params["step"] == "encode":
            blocks.setdefault(item.part.name.rpartition("-")[0], []).append(item)
    rows, whole = [], []
    for slide in slides:
        done = sorted(blocks.get(slide.part.name, []), key=lambda item: item.part.name)
        count = sum(int(item.values["tiles"]) for item in done)
        if count < slide.values["tiles"]:
            ctx.finding(Finding(
                "SLIDE_INCOMPLETE", "Blocks of the slide failed; it has no features.", "refused", slide.part.inputs[0],
                {"tiles": slide.values["tiles"], "encoded": count},
            ))  # fmt: skip
            continue
        whole.append(slide)
        rows.append((slide.part.name, count, _publish(slide, done, params, made, ctx)))
    with (ctx.out / "features.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("slide", "tiles", "features"), *rows])
    total = sum(count for _, count, _ in rows)
    return Result(
        values={"encoder": made.name, "slides": len(rows), "tiles": total, "features": {n: p for n, _, p in rows}},
        metrics={"slides": float(len(rows)), "tiles": float(total)},
        figures=tiles.pictures(whole, ctx),
    )


def _publish(
    slide: DonePart, done: Sequence[DonePart], params: Mapping[str, Any], made: encoders.Recipe, ctx: Context
) -> str:
    """The slide's Zarr and its exports in `ctx.out`; returns the Zarr's name."""
    corners, facts = tiles.read_index(slide.folder / tiles.INDEX)
    facts |= {"encoder": made.name, "encoder_digest": made.digest, "objective": slide.values["objective"]}
    name = f"features/{slide.part.name}.zarr"
    features.assemble(
        ctx.out / name, corners, [item.folder / features.CHUNK for item in done], block=block_size(params),
        dim=int(done[0].values["dim"]), encoder=made.name, facts=facts,
    )  # fmt: skip
    for kind in params["exports"]:
        write, suffix = _EXPORTS[kind]
        write(ctx.out / name, ctx.out / f"{kind}/{slide.part.name}{suffix}")
    return name


def load_model(spec: JobSpec, ctx: Context) -> Any:
    from permed_compute.workloads.pathology import networks

    with ctx.stage("load encoder"):
        return networks.load(encoders.recipe(params_of(spec.params)["encoder"]), ctx.device, ctx.threads)


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return encoders.recipe(params_of(spec.params)["encoder"]).digest


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, run=run, reduce=reduce, model_digest=model_digest, version=VERSION
)
