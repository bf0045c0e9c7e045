"""What segments slides: which one a job means (`recipe`), and the thing at work (`load`).

    model: nuclei                                                haematoxylin, threshold, watershed (ours, no weights)
    model: lavlab-shell                                          ships, models/pathology/<name>; weights in a package
    model: {shipped: lavlab-shell, wheel: /models/x.whl}         the same weights out of a wheel that is not installed
    model: {onnx: /models/mine.onnx, sha256: 77aa…, mpp: 0.5, classes: [Tumour, Stroma, null]}
    model: {callable: "mine:segment", gives: instances, mpp: 0.5, halo: 64, classes: [Nucleus]}
    optional: name, colours; of networks: window, overlap, decide (argmax | sigmoid), mean, std, front (rgb | eho)

A network (n, 3, h, w) float32 → (n, channels, h, w) looks through windows of one grid over the whole slide, blended by
a Gaussian, so that a pixel's label does not depend on its tile. `classes` names its channels in order;
null is background. A callable is `f(pixels, mpp) -> labels`: (h, w, 3) uint8 to (h, w) integers, 0 background, either
numbers of classes or of instances; it must see no further than `halo` pixels.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.workloads.pathology import encoders, stain
from permed_compute.workloads.pathology.labels import Named
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.tissue import Tissue

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the model's resolution."""

_COLOURS = ((200, 40, 40), (60, 130, 220), (60, 170, 90), (230, 170, 40), (150, 80, 190), (90, 90, 90))
_KINDS = ("shipped", "onnx", "callable")
_NETWORK_KEYS = {"window", "overlap", "decide", "mean", "std", "front"}
_KEYS = {
    "shipped": {"shipped", "wheel", "window", "overlap"},
    "onnx": {"onnx", "sha256", "name", "mpp", "classes", "colours", *_NETWORK_KEYS},
    "callable": {"callable", "gives", "name", "mpp", "halo", "classes", "colours"},
}
_MOST_CLASSES = 255


@dataclass(frozen=True)
class Recipe:
    """What a segmenter is, before it is loaded. digest: of weights and of all that decides its labels.

    channels: the label that each of a network's channels gives, 0 for background. halo: pixels that it sees beyond.
    """

    name: str
    kind: Literal["nuclei", "onnx", "callable"]
    digest: str
    gives: Literal["classes", "instances"]
    mpp: float
    classes: tuple[Named, ...]
    halo: int = 0
    files: tuple[Path, ...] = ()
    wheel: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def needs(self, core: Box, size: tuple[int, int]) -> Box:
        """What must be read for the labels of `core`. size: (width, height) of the slide in the model's pixels."""
        if self.kind != "onnx":
            return core[0] - self.halo, core[1] - self.halo, core[2] + self.halo, core[3] + self.halo
        window, overlap = self.options["window"], self.options["overlap"]
        across = windows(core[0], core[2], size[0], window, overlap)
        down = windows(core[1], core[3], size[1], window, overlap)
        return across[0], down[0], across[-1] + window, down[-1] + window


def windows(begin: int, end: int, length: int, window: int, overlap: float) -> list[int]:
    """Where the windows that cover begin … end start: every (1 - overlap) of a window from 0, the last one moved in."""
    step = max(1, int(window * (1 - overlap)))
    last = max(0, length - window)
    starts = dict.fromkeys(min(k * step, last) for k in range(-(-last // step) + 1))
    return [start for start in starts if start < end and start + window > begin]


# ------------------------------------------------------------------------------------------------ recipes


def recipe(given: str | Mapping[str, Any]) -> Recipe:
    """The segmenter that a job names. Raises `WorkloadError` for an unknown name, key or file, or another digest."""
    if given == "nuclei":
        return _NUCLEI
    said = {"shipped": given} if isinstance(given, str) else dict(given)
    kinds = [kind for kind in _KINDS if kind in said]
    wrong = set(said) - _KEYS[kinds[0]] if len(kinds) == 1 else set(said)
    if wrong or len(kinds) != 1:
        raise _misunderstood(", ".join(sorted(wrong)) or "kind")
    try:
        return {"shipped": _of_shipped, "onnx": _of_file, "callable": _of_callable}[kinds[0]](said)
    except (TypeError, ValueError, KeyError) as error:
        raise _misunderstood(str(error)) from error


def _misunderstood(what: str) -> WorkloadError:
    return WorkloadError(
        f"The model is not understood ({what}).", remedy="See docs/pathology.md for the ways to name one."
    )


def _of_shipped(said: Mapping[str, Any]) -> Recipe:
    _, about = encoders.shipped("segmenter", str(said["shipped"]), ["nuclei"])
    files: Mapping[str, str] = about["files"]
    wheel = Path(said["wheel"]) if "wheel" in said else None
    if wheel is None:
        folder = encoders.installed(about)
        paths = tuple(folder / name for name in files)
        digests = [encoders.file_digest(path, wanted) for path, wanted in zip(paths, files.values(), strict=True)]
    else:
        paths = tuple(Path(about["package"]) / name for name in files)
        digests = [_member_digest(wheel, path, wanted) for path, wanted in zip(paths, files.values(), strict=True)]
    return _network(str(said["shipped"]), digests, {**about, **said}, paths, wheel)


def _member_digest(wheel: Path, member: Path, wanted: str) -> str:
    if not wheel.is_file():
        raise WorkloadError("The wheel is not there.", remedy="Give the path of a file you have.")
    stat = wheel.stat()
    digest = _hashed(wheel, member.as_posix(), stat.st_size, stat.st_mtime_ns)
    if digest != wanted:
        raise WorkloadError(
            f"The weights in the wheel have digest {digest[:16]}…, not {wanted[:16]}…: another release.",
            remedy="Get the release that the model names.",
        )
    return digest


@cache
def _hashed(wheel: Path, member: str, size: int, mtime: int) -> str:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return hashlib.sha256(archive.read(member)).hexdigest()
    except (KeyError, zipfile.BadZipFile) as error:
        raise WorkloadError("The wheel does not hold the model's weights.", remedy="Get the right wheel.") from error


def _of_file(said: Mapping[str, Any]) -> Recipe:
    file = Path(said["onnx"])
    digests = [encoders.file_digest(file, str(said.get("sha256", "")))]
    beside = file.with_name(f"{file.name}.data")  # where exporters put weights beyond the graph
    files = (file, beside) if beside.is_file() else (file,)
    digests += [encoders.file_digest(path, "") for path in files[1:]]
    return _network(str(said.get("name") or f"onnx-{digests[0][:8]}"), digests, said, files)


def _network(
    name: str, digests: list[str], said: Mapping[str, Any], files: tuple[Path, ...], wheel: Path | None = None
) -> Recipe:
    options: dict[str, Any] = {
        "window": int(said.get("window", 512)), "overlap": float(said.get("overlap", 0.25)),
        "decide": str(said.get("decide", "argmax")), "front": str(said.get("front", "rgb")),
        "mean": [float(v) for v in said.get("mean", (0, 0, 0))], "std": [float(v) for v in said.get("std", (1, 1, 1))],
    }  # fmt: skip
    if not (options["window"] >= 16 and 0 <= options["overlap"] <= 0.75):
        raise ValueError("window from 16, overlap 0 … 0.75")
    if options["decide"] not in ("argmax", "sigmoid") or options["front"] not in ("rgb", "eho"):
        raise ValueError("decide: argmax or sigmoid; front: rgb or eho")
    if len(options["mean"]) != 3 or len(options["std"]) != 3 or min(options["std"]) <= 0:
        raise ValueError("mean and std: three values")
    named = list(said["classes"])
    if named.count(None) > 1:
        raise ValueError("classes: one null at most")
    numbers = iter(range(1, len(named) + 1))
    options["channels"] = [0 if each is None else next(numbers) for each in named]
    classes = _classes([each for each in named if each is not None], said)
    return Recipe(
        name, "onnx", _digest(digests, float(said["mpp"]), options, classes), "classes", float(said["mpp"]), classes,
        0, files, wheel, options,
    )  # fmt: skip


def _of_callable(said: Mapping[str, Any]) -> Recipe:
    gives = said.get("gives", "classes")
    if gives not in ("classes", "instances") or int(said["halo"]) < 0:
        raise ValueError("gives: classes or instances; halo: pixels")
    classes = _classes(list(said["classes"]), said)
    if gives == "instances" and len(classes) != 1:
        raise ValueError("instances are of one class")
    target = str(said["callable"])
    source = inspect.getsourcefile(_imported(target))
    body = [hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else "", target]
    mpp, halo = float(said["mpp"]), int(said["halo"])
    digest = _digest(body, mpp, {"gives": gives, "halo": halo}, classes)
    name = str(said.get("name") or target)
    return Recipe(name, "callable", digest, gives, mpp, classes, halo, options={"target": target})


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise WorkloadError(
            f"Module {module!r} cannot be imported: {error}.", remedy="Name its folder under `code:` of the job."
        ) from error
    if not callable(found):
        raise WorkloadError(f"{target!r} is no function.", remedy="Write module:function.")
    return found


def _classes(names: list[Any], said: Mapping[str, Any]) -> tuple[Named, ...]:
    if not names or len(names) > _MOST_CLASSES or not all(isinstance(name, str) and name for name in names):
        raise ValueError("classes: a list of names")
    colours = [tuple(int(v) for v in colour) for colour in said.get("colours", ())]
    if any(len(colour) != 3 or not all(0 <= v <= 255 for v in colour) for colour in colours):
        raise ValueError("colours: [red, green, blue] for each class")
    shown = [colours[k] if k < len(colours) else _COLOURS[k % len(_COLOURS)] for k in range(len(names))]
    return tuple(
        Named(k + 1, name, (colour[0], colour[1], colour[2]))
        for k, (name, colour) in enumerate(zip(names, shown, strict=True))
    )


def _digest(body: list[str], mpp: float, options: Mapping[str, Any], classes: tuple[Named, ...]) -> str:
    names = [item.name for item in classes]
    return hashlib.sha256(json.dumps([body, mpp, dict(options), names], sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ at work


class Segmenter(Protocol):
    """What is loaded once per worker."""

    def measure(self, reader: Reader, found: Tissue, seed: int) -> dict[str, Any]:
        """What it must know of a slide before its tiles (JSON): stains, thresholds."""
        ...

    def labels(self, pixels: np.ndarray, box: Box, core: Box, size: tuple[int, int], facts: Any) -> np.ndarray:
        """Of `box` for instances, of `core` for classes; `pixels`: (h, w, 3) uint8 of `box` as the recipe `needs`."""
        ...


def load(made: Recipe, device: str, threads: int, scratch: Path) -> Segmenter:
    """The segmenter on its device. Raises `WorkloadError` where a library is missing or a graph does not fit."""
    if made.kind == "nuclei":
        return Nuclei(made)
    return Network(made, device, threads, scratch) if made.kind == "onnx" else Called(made)


class Network:
    """An ONNX graph, window by window."""

    def __init__(self, made: Recipe, device: str, threads: int, scratch: Path) -> None:
        from permed_compute.workloads.pathology import networks

        self.made = made
        self._session = networks.onnx_session(_graph(made, scratch), device.partition(":")[0], threads)
        told, gives = self._session.get_inputs(), self._session.get_outputs()
        self._check(told[0].shape if len(told) == 1 else [], gives[0].shape)
        self._input, self._output = told[0].name, gives[0].name
        self._weights = gaussian(made.options["window"])

    def _check(self, shape: list[Any], gives: list[Any]) -> None:
        window, channels = self.made.options["window"], len(self.made.options["channels"])
        if len(shape) != 4 or len(gives) != 4:
            raise WorkloadError("The graph is not (n, 3, h, w) → (n, channels, h, w).", remedy="Export it so.")
        if isinstance(shape[1], int) and shape[1] != 3:
            raise WorkloadError(f"The graph takes {shape[1]} channels; slides have 3.", remedy="Export it for RGB.")
        if isinstance(gives[1], int) and gives[1] != channels:
            raise WorkloadError(
                f"The graph gives {gives[1]} channels; the job names {channels}.", remedy="Name each under `classes`."
            )
        if isinstance(shape[0], int) and shape[0] != 1:
            raise WorkloadError(f"The graph takes {shape[0]} windows at a time.", remedy="Export it with a free batch.")
        if any(isinstance(edge, int) and edge != window for edge in shape[2:]):
            raise WorkloadError(
                f"The graph takes windows of {shape[3]} × {shape[2]}, not {window}.", remedy="Write that as `window`."
            )

    def measure(self, reader: Reader, found: Tissue, seed: int) -> dict[str, Any]:
        return stain.eho(found.view.pixels, found.tissue) if self.made.options["front"] == "eho" else {}

    def labels(self, pixels: np.ndarray, box: Box, core: Box, size: tuple[int, int], facts: Any) -> np.ndarray:
        options = self.made.options
        window, channels = options["window"], len(options["channels"])
        height, width = core[3] - core[1], core[2] - core[0]
        total = np.zeros((channels, height, width), np.float32)
        weight = np.zeros((height, width), np.float32)
        for y in windows(core[1], core[3], size[1], window, options["overlap"]):
            for x in windows(core[0], core[2], size[0], window, options["overlap"]):
                seen = pixels[y - box[1] :, x - box[0] :][:window, :window]
                made = self._logits(self._front(seen, facts))
                a, b = max(y, core[1]), min(y + window, core[3])
                c, d = max(x, core[0]), min(x + window, core[2])
                inner = slice(a - y, b - y), slice(c - x, d - x)
                place = slice(a - core[1], b - core[1]), slice(c - core[0], d - core[0])
                total[:, *place] += made[:, *inner] * self._weights[inner]
                weight[place] += self._weights[inner]
        # Beyond the slide no window looks; the job keeps nothing there.
        return decided(total / np.maximum(weight, 1e-6), options["channels"], options["decide"])

    def _front(self, pixels: np.ndarray, facts: Any) -> np.ndarray:
        if self.made.options["front"] == "eho":
            channels = stain.as_eho(pixels, facts).astype(np.float32) / 255
        else:
            mean, std = (np.array(self.made.options[name], np.float32) for name in ("mean", "std"))
            channels = (pixels.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(channels.transpose(2, 0, 1)[None])

    def _logits(self, x: np.ndarray) -> np.ndarray:
        made = np.asarray(self._session.run([self._output], {self._input: x})[0], np.float32)
        wanted = (1, len(self.made.options["channels"]), *x.shape[2:])
        if made.shape != wanted:
            raise WorkloadError(
                f"The graph gives {made.shape} for a window of {x.shape[3]} × {x.shape[2]}, not {wanted}.",
                remedy="Write a `window` that it takes, and each channel under `classes`.",
            )
        logits: np.ndarray = made[0]
        return logits


def gaussian(window: int) -> np.ndarray:
    """(window, window) float32 weights of a window's pixels: σ an eighth of it, at least 1/1000 (as MONAI's)."""
    at = np.arange(window, dtype=np.float32) - (window - 1) / 2
    line = np.exp(-(at**2) / (2 * (window / 8) ** 2)).astype(np.float32)
    return np.asarray(np.maximum(np.outer(line, line), 1e-3), np.float32)


def decided(logits: np.ndarray, channels: list[int], decide: str) -> np.ndarray:
    """(h, w) uint8 labels. sigmoid: the first class above 0.5 and above background; argmax: the highest channel."""
    if decide == "argmax":
        return np.asarray(np.array(channels, np.uint8)[logits.argmax(0)])
    ground = logits[channels.index(0)] if 0 in channels else np.float32(0)
    least = np.maximum(ground, 0)
    labels = np.zeros(logits.shape[1:], np.uint8)
    for channel, number in reversed([(k, number) for k, number in enumerate(channels) if number]):
        labels[logits[channel] > least] = number
    return labels


def _graph(made: Recipe, scratch: Path) -> Path:
    """The graph's file, with what belongs beside it; out of the wheel where it is in one."""
    if made.wheel is None:
        return made.files[0]
    folder = scratch / f"model-{made.digest[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with zipfile.ZipFile(made.wheel) as archive:
        for member in made.files:
            with archive.open(member.as_posix()) as source, (folder / member.name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return folder / made.files[0].name


class Called:
    """A user's function."""

    def __init__(self, made: Recipe) -> None:
        self.made, self._call = made, _imported(made.options["target"])

    def measure(self, reader: Reader, found: Tissue, seed: int) -> dict[str, Any]:
        return {}

    def labels(self, pixels: np.ndarray, box: Box, core: Box, size: tuple[int, int], facts: Any) -> np.ndarray:
        labels = np.asarray(self._call(pixels, self.made.mpp))
        remedy = "Return (h, w) integers, 0 for background."
        if labels.shape != pixels.shape[:2] or labels.dtype.kind not in "iub":
            raise WorkloadError(
                f"{self.made.name} gave {labels.dtype} of {labels.shape} for {pixels.shape[:2]}.", remedy=remedy
            )
        if labels.min(initial=0) < 0:
            raise WorkloadError(f"{self.made.name} gave a negative label.", remedy=remedy)
        if self.made.gives == "instances":
            return labels.astype(np.int64)
        most = int(labels.max(initial=0))
        if most > len(self.made.classes):
            raise WorkloadError(
                f"{self.made.name} gave label {most}; the job names {len(self.made.classes)} classes.",
                remedy="Name each under `classes`.",
            )
        (x0, y0, x1, y1) = core
        return labels[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]].astype(np.uint8)


# ------------------------------------------------------------------------------------------------ nuclei

_NUCLEUS_UM2 = (8.0, 300.0)
_SMOOTH_UM, _AROUND_UM, _APART_UM = 0.75, 6.0, 2.5
_PATCHES, _PATCH = 24, 256
_LEAST_HAEMATOXYLIN = 0.2
"""Optical density (natural logarithm) of haematoxylin: the least of a nucleus, and by how much it exceeds what is
around it. Keratin and thick folds are dark over more than a nucleus."""

_NUCLEI_MPP = 0.5
_NUCLEI = Recipe(
    "nuclei", "nuclei",
    _digest(["nuclei-1"], _NUCLEI_MPP, {"um2": _NUCLEUS_UM2, "um": [_SMOOTH_UM, _AROUND_UM, _APART_UM]}, ()),
    "instances", _NUCLEI_MPP, (Named(1, "Nucleus", (60, 70, 170)),), halo=64,
)  # fmt: skip


class Nuclei:
    """Nuclei in H&E: more of the slide's own haematoxylin than one threshold per slide and than around; a watershed."""

    def __init__(self, made: Recipe) -> None:
        self.made = made

    def measure(self, reader: Reader, found: Tissue, seed: int) -> dict[str, Any]:
        """Stain vectors from the view; the threshold by Otsu's method over patches of tissue at full resolution."""
        from skimage import filters

        fitted = stain.estimate(found.view.pixels[found.tissue], seed=seed)
        vectors = stain.REFERENCE if fitted is None else fitted.vectors.round(4)
        random = np.random.default_rng(seed)
        places = np.argwhere(found.tissue)
        chosen = places[np.sort(random.choice(len(places), min(_PATCHES, len(places)), replace=False))]
        scale, mpp = found.view.scale, self.made.mpp
        half = _PATCH / 2 * mpp
        corners = [
            (round((x + 0.5) * scale[0] - half / reader.mpp[0]), round((y + 0.5) * scale[1] - half / reader.mpp[1]))
            for y, x in chosen.tolist()
        ]
        amounts = np.stack([self._amount(tile, vectors) for tile in reader.read_many(mpp, corners, _PATCH)])
        otsu: Any = filters.threshold_otsu
        threshold = float(otsu(amounts)) if float(np.ptp(amounts)) > 0 else 0.0
        return {"vectors": vectors.tolist(), "threshold": round(max(threshold, _LEAST_HAEMATOXYLIN), 4)}

    def labels(self, pixels: np.ndarray, box: Box, core: Box, size: tuple[int, int], facts: Any) -> np.ndarray:
        from scipy import ndimage
        from skimage.measure import label
        from skimage.segmentation import watershed

        mpp = self.made.mpp
        amount = self._amount(pixels, np.array(facts["vectors"]))
        around = ndimage.gaussian_filter(amount, _AROUND_UM / mpp, truncate=2.0)
        mask = (amount > facts["threshold"]) & (amount > around + _LEAST_HAEMATOXYLIN)
        mask = ndimage.binary_opening(ndimage.binary_closing(mask), iterations=2)
        depth: Any = ndimage.distance_transform_edt(mask)
        depth = ndimage.gaussian_filter(depth.astype(np.float32), 0.5 / mpp, truncate=3.0)
        apart = 2 * round(_APART_UM / mpp) + 1
        peaks = mask & (depth >= ndimage.maximum_filter(depth, apart))
        number: Any = label
        split: Any = watershed
        labels: np.ndarray = split(-depth, number(peaks, connectivity=2), mask=mask)
        sizes = np.bincount(labels.reshape(-1)) * mpp**2
        keep = (sizes >= _NUCLEUS_UM2[0]) & (sizes <= _NUCLEUS_UM2[1])
        keep[0] = False
        return np.where(keep[labels], labels, 0).astype(np.int64)

    def _amount(self, pixels: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """(h, w) float32 smoothed optical density of haematoxylin."""
        from scipy import ndimage

        row = np.linalg.pinv(vectors)[0].astype(np.float32)
        density = -np.log((np.arange(256, dtype=np.float32) + 1) / 240)
        amount = sum(density[pixels[..., channel]] * row[channel] for channel in range(3))
        smooth: np.ndarray = ndimage.gaussian_filter(np.asarray(amount), _SMOOTH_UM / self.made.mpp, truncate=3.0)
        return smooth
