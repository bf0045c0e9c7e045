"""Tiles per CPU-second from one JPEG slide: ours from the store, and every reader that people use today."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs import slides

TITLE = "Reading slide tiles"
WHY = (
    "An encoder waits for tiles: the JPEG decoder should be the limit, not what lies around it. All give the same"
    " RGB pixels, which is checked; one thread each, warm. Ours are read into one buffer, again and again, as the"
    " encoding job does; fresh memory for each batch costs as much as decoding. Goals against OpenSlide: 4 times"
    " aligned, twice off the grid in order."
)

Read = Callable[[int, int, int], np.ndarray]


def cases(quick: bool) -> list[Case]:
    edge, count = (2048, 40) if quick else (10_240, 320)
    readers = {
        "OpenSlide": openslide, "MONAI WSIReader": monai, "tifffile + zarr": tifffile,
        "zarr-python, same store": zarrs, "zarr-python, zstd": zarr_zstd, "tensorstore, zstd": tensorstore,
    }  # fmt: skip
    random = np.random.default_rng(0)
    found: list[Case] = []
    for group, size, places, goal in (
        ("256 aligned, tiles/CPU-s", 256, grid(edge, 256, 0)[:count], 4.0),
        ("512 aligned, tiles/CPU-s", 512, grid(edge, 512, 0)[:count], 4.0),
        ("256 off the grid, in order, tiles/CPU-s", 256, grid(edge, 256, 100)[:count], 2.0),
        ("256 off the grid, at random, tiles/CPU-s", 256, random.integers(0, edge - 256, (count, 2)), None),
    ):
        found.append(
            Case(group, "ours, store", "tiles/s", "higher", ours(edge, size, places, 0.25), ratio=goal,
                 goal=f"≥ {goal:g} × OpenSlide" if goal else "")
        )  # fmt: skip
        found.append(
            Case(group, "ours, the slide itself", "tiles/s", "higher", ours(edge, size, places, 0.25, raw=True))
        )
        for name, make in readers.items():
            found.append(Case(group, name, "tiles/s", "higher", theirs(make, edge, size, places), peer=True))
    group, places = "40× to 20×, 256, tiles/CPU-s", grid(edge, 512, 0)[: count // 2]
    found += [
        Case(group, "ours, stored level", "tiles/s", "higher", ours(edge, 256, places, 0.5), ratio=4.0,
             goal="≥ 4 × OpenSlide"),
        Case(group, "ours, halved in the DCT", "tiles/s", "higher", ours(edge, 256, places, 0.5, raw=True)),
        Case(group, "OpenSlide + Pillow", "tiles/s", "higher", theirs(openslide_half, edge, 256, places), peer=True),
    ]  # fmt: skip
    return found


def grid(edge: int, step: int, offset: int) -> np.ndarray:
    """(n, 2) x, y in order, row by row."""
    at = np.arange(offset, edge - step - offset + 1, step)
    return np.stack([axis.ravel() for axis in np.meshgrid(at, at)], 1)


def ours(edge: int, size: int, places: np.ndarray, mpp: float, *, raw: bool = False) -> Callable[[], float]:
    def measure() -> float:
        from permed_compute.workloads.pathology.reader import Reader
        from permed_compute.workloads.pathology.source import open_slide

        with Reader(open_slide(slides.slide(edge) if raw else slides.store(edge))) as reader:
            pixels = np.empty((64, size, size, 3), np.uint8)

            def work(several: np.ndarray = places) -> int:
                for k in range(0, len(several), 64):
                    part = several[k : k + 64]
                    reader.read_many(mpp, part, size, pixels[: len(part)])
                return len(several)

            work(places[:64])
            return slides.rate(work)

    return measure


def theirs(make: Callable[[int], Read], edge: int, size: int, places: np.ndarray) -> Callable[[], float]:
    def measure() -> float:
        try:
            read = make(edge)
        except ImportError as error:
            raise LeftOutError(f"{error.name} is not installed (extra: bench)") from None
        x, y = (int(v) for v in places[0])
        _check(read(x, y, size), edge, x, y, size, make)

        def work() -> int:
            for x, y in places.tolist():
                read(x, y, size)
            return len(places)

        return slides.rate(work)

    return measure


def _check(seen: np.ndarray, edge: int, x: int, y: int, size: int, make: Callable[[int], Read]) -> None:
    from permed_compute.workloads.pathology.reader import Reader
    from permed_compute.workloads.pathology.source import open_slide
    from permed_compute.workloads.pathology.store import psnr

    half = make is openslide_half
    with Reader(open_slide(slides.slide(edge))) as reader:
        wanted = reader.read(0.5 if half else 0.25, x, y, size)
    if seen.shape != wanted.shape or psnr(seen, wanted) < (30 if half else 98):
        raise ValueError(f"{make.__name__} gives other pixels ({psnr(seen, wanted):.1f} dB)")


def openslide(edge: int) -> Read:
    import openslide

    slide = openslide.OpenSlide(slides.slide(edge))
    return lambda x, y, size: np.asarray(slide.read_region((x, y), 0, (size, size)).convert("RGB"))


def openslide_half(edge: int) -> Read:
    import openslide
    from PIL import Image

    slide = openslide.OpenSlide(slides.slide(edge))

    def read(x: int, y: int, size: int) -> np.ndarray:
        region = slide.read_region((x, y), 0, (2 * size, 2 * size)).convert("RGB")
        return np.asarray(region.resize((size, size), Image.Resampling.BOX))

    return read


def monai(edge: int) -> Read:
    from monai.data.wsi_reader import WSIReader

    reader = WSIReader("openslide", level=0, channel_dim=2)
    slide = reader.read(str(slides.slide(edge)))
    return lambda x, y, size: reader.get_data(slide, location=(y, x), size=(size, size))[0]


def tifffile(edge: int) -> Read:
    import tifffile
    import zarr

    array = zarr.open(tifffile.imread(slides.slide(edge), aszarr=True, key=0), mode="r")
    return lambda x, y, size: np.asarray(array[y : y + size, x : x + size])


def zarrs(edge: int) -> Read:
    import zarr

    from permed_compute.storage import zarr_jpeg

    zarr_jpeg.register()
    array = zarr.open_group(slides.store(edge), mode="r")["0"]
    return lambda x, y, size: np.ascontiguousarray(array[:, y : y + size, x : x + size].transpose(1, 2, 0))


def zarr_zstd(edge: int) -> Read:
    import zarr

    array = zarr.open_array(slides.zstd(edge), mode="r")
    return lambda x, y, size: np.asarray(array[y : y + size, x : x + size])


def tensorstore(edge: int) -> Read:
    import tensorstore

    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(slides.zstd(edge))},
         "context": {"data_copy_concurrency": {"limit": 1}}}, open=True,
    ).result()  # fmt: skip
    return lambda x, y, size: array[y : y + size, x : x + size].read().result()
