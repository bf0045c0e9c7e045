"""Job `pathology/convert`: one part per slide, each a slide store with a thumbnail.

`params` of the job:
    to        ''       folder for the stores; resumed shard by shard after a kill. '' keeps them with the job's results
    coding    jpeg     of tiles that cannot be copied: jpeg (Q90 4:4:4, PSNR recorded) or zstd (lossless, large)
    verify    sample   after writing, decode every 16th tile and compare with the source; `all` every tile, `none` none
    mpp       null     µm per pixel at level 0, where the slides do not say or are wrong
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from permed_compute.errors import StoppedError
from permed_compute.spec import JobSpec
from permed_compute.workloads.pathology import inputs
from permed_compute.workloads.pathology.source import refuse
from permed_compute.workloads.pathology.store import SUFFIX
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "1"
THUMBNAIL = "thumbnail.jpg"
_EVERY = {"sample": 16, "all": 1}
_MOST_FIGURES = 24
_PARAMS = {
    "to": ("", lambda value: isinstance(value, str), "the path of a folder"),
    "coding": ("jpeg", lambda value: value in ("jpeg", "zstd"), "jpeg or zstd"),
    "verify": ("sample", lambda value: value in ("sample", "all", "none"), "sample, all or none"),
    "mpp": inputs.MPP,
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return inputs.checked(given, _PARAMS, "pathology/convert")


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    return inputs.slides(spec, ctx, params_of(spec.params))


def load(part: Part, ctx: Context) -> tuple[Part, Any]:
    return part, inputs.open_part(part, ctx, part.params["mpp"])


def run(data: tuple[Part, Any], model: None, ctx: Context) -> PartResult:
    from permed_compute.workloads.pathology import convert, jpeg, verify
    from permed_compute.workloads.pathology.reader import Reader
    from permed_compute.workloads.pathology.store import StoreSlide

    part, slide = data
    folder = Path(part.params["to"]) if part.params["to"] else ctx.out
    path = folder / f"{part.name}{SUFFIX}"
    with slide:
        with ctx.stage("convert"):
            record = inputs.named(part, lambda: convert.convert(
                slide, path, digest=part.inputs[0], coding=part.params["coding"], threads=ctx.threads,
                stopping=ctx.should_stop,
            ))  # fmt: skip
        if record is None:
            raise StoppedError("Asked to stop in the middle of a slide.", remedy="`permed resume` goes on there.")
        checked = None
        if part.params["verify"] != "none":
            with ctx.stage("verify"):
                checked = verify.verify(path, slide, threads=ctx.threads, every=_EVERY[part.params["verify"]])
            if checked.wrong:
                refuse("STORE_DIFFERS", "The store is not what the slide holds.", "`permed verify` lists the tiles.",
                       wrong=len(checked.wrong))  # fmt: skip
    with StoreSlide(path) as made:
        reader = Reader(made)
        longest = max(reader.dimensions)
        mpp = max(reader.mpp) * max(1.0, longest / 512)
        size = tuple(max(1, round(edge * own / mpp)) for edge, own in zip(reader.dimensions, reader.mpp, strict=True))
        (ctx.out / THUMBNAIL).write_bytes(jpeg.encode(reader.read(mpp, 0, 0, (size[0], size[1])), 80))
        about = made.about
    levels = record["levels"]
    copied = sum(level["bytes"] for level in levels if level["origin"] == "copied")
    values = {
        "kind": about.kind, "mpp": list(about.mpp), "objective": about.objective,
        "width": levels[0]["width"], "height": levels[0]["height"], "origin": levels[0]["origin"],
        "source_bytes": record["source_tile_bytes"], "copied_bytes": copied,
        "store_bytes": sum(level["bytes"] for level in levels), "levels": len(levels),
        "psnr_db": levels[0].get("psnr_db"), "store": path.name,
        "tiles_checked": checked.tiles if checked else 0, "tiles_exact": checked.exact if checked else 0,
    }  # fmt: skip
    return PartResult(values=values)


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """A table of stores, their thumbnails, and what they take."""
    done = sorted(results, key=lambda item: item.part.name)
    columns = ("store", "kind", "origin", "width", "height", "levels", "source_bytes", "store_bytes", "psnr_db")
    with (ctx.out / "stores.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows([[item.values[column] for column in columns] for item in done])
    figures = []
    for item in done[:_MOST_FIGURES]:
        name = f"{item.part.name}-{THUMBNAIL}"
        shutil.copyfile(item.folder / THUMBNAIL, ctx.out / name)
        figures.append((name, f"{item.values['width']} × {item.values['height']} pixels ({item.part.name})"))
    total = {name: sum(int(item.values[name]) for item in done) for name in ("source_bytes", "store_bytes")}
    return Result(
        values={"parts": {item.part.name: dict(item.values) for item in done}, **total},
        metrics={"slides": float(len(done)), **{name: float(value) for name, value in total.items()}},
        figures=figures,
    )


WORKLOAD = Map(plan=plan, load=load, run=run, reduce=reduce, version=VERSION)
