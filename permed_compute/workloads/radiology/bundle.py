"""An unmodified MONAI bundle over volumes: its own network, preprocessing and windows, our streamed way to labels.

    check(folder) -> Checked            digest of every file; weights that are other than said, or pickled, are refused
    Plain(folder, …) -> Runner          in this process: `runners.open_bundle` decides between this and a sealed one
    Runner.segment(image, grid) -> Segmented
    Runner.probabilities(image) -> {class: 0 to 1}

A bundle's `$` expressions are Python that runs when its configuration is read, so reading is already running it.
Whoever operates the machines says which digests are trusted (`cluster/bundles.yaml`, and the file that
PERMED_ALLOWED_BUNDLES names there); a job cannot. All others run in a process without network that writes only to its
own folder (`sealed.py`), and see pixels and an affine, no names.

`inference.json` must have the keys that MONAI's bundle specification names: `network_def`, `inferer`, `preprocessing`
for one image (`image`); `postprocessing` may be absent. Activation, argmax or threshold and the inversion of the
preprocessing are done in the stream; a bundle whose postprocessing does anything else runs as MONAI would run it.
A bundle that answers with probabilities has, instead of `inferer`, what `publish_classes` writes: `classes` and
`probabilities`, a function of the preprocessed item.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from permed_compute.errors import NotFoundError, WorkloadError
from permed_compute.workloads.from_source import compile_anew
from permed_compute.workloads.radiology import precision, sliding
from permed_compute.workloads.radiology.sliding import Decision, Grid, Windows

CONFIG = "configs/inference.json"
WEIGHTS = "models/model.pt"
ALLOWED = "PERMED_ALLOWED_BUNDLES"
_MOST_FILES = 2000
_DRIFT = 0.01
"""Voxels by which an axis may run askew over the whole volume before the grids are not called parallel."""
LABELS, PROBABILITIES = "labels", "probabilities"
_NEEDED = {
    LABELS: ("network_def", "inferer", "preprocessing"),
    PROBABILITIES: ("network_def", "preprocessing", "classes", "probabilities"),
}
_MOST_CLASSES, _LONGEST_CLASS = 1000, 64
_PASSING = frozenset({"EnsureType", "EnsureTyped", "SaveImage", "SaveImaged", "ToTensord", "ToDeviced"})


@dataclass(frozen=True, slots=True)
class Options:
    """What a job adds to a bundle."""

    weights: tuple[str, ...] = (WEIGHTS,)
    """Several are an ensemble of the same network: the mean of their logits."""
    flips: tuple[tuple[int, ...], ...] = ()
    """Test-time augmentation: axes 0-2 of each flip; the image as it is is always among them."""
    keep_bytes: int = sliding.KEEP_BYTES
    answers: str = LABELS
    """Or PROBABILITIES; of the first weights, of the image as it is."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Options:
        flips = tuple(tuple(flip) for flip in row["flips"])
        return cls(tuple(row["weights"]), flips, row["keep_bytes"], row["answers"])


@dataclass(frozen=True, slots=True)
class Segmented:
    """labels: on the image's own voxels. windows: those used, `shrunk` where memory did not suffice for the bundle's.

    streamed: false where the bundle's inferer or postprocessing is of a kind that runs whole, as MONAI would.
    """

    labels: np.ndarray = field(repr=False)
    windows: tuple[int, ...]
    shrunk: bool
    streamed: bool
    network_s: float


# ------------------------------------------------------------------------------------------------ what lies there


@dataclass(frozen=True, slots=True)
class Checked:
    """A bundle's folder whose weights are what they should be. digest: of every file's path and bytes."""

    root: Path
    digest: str


def check(
    root: Path,
    weights: Sequence[str] = (WEIGHTS,),
    expected: str = "",
    digest_of: Callable[[Path], str] | None = None,
) -> Checked:
    """Digest the folder; refuse weights that differ from `large_files.yml` or that only unpickling would open.

    `digest_of`: SHA-256 of a file's bytes, e.g. the context's cached one.

    Raises `NotFoundError`, `WorkloadError`.
    """
    if not (root / CONFIG).is_file():
        raise NotFoundError("The bundle has no configs/inference.json.", remedy="Give the folder of a MONAI bundle.")
    digests = _digests(root, digest_of)
    digest = _of_all(digests)
    if expected and digest != expected:
        raise WorkloadError(
            f"The bundle's digest is {digest}, not {expected}.", remedy="Fetch it again, or write the new digest."
        )
    for name in weights:
        _check_weights(root, name, digests)
    return Checked(root, digest)


def folder_digest(root: Path, digest_of: Callable[[Path], str] | None = None) -> str:
    """Of every file's path and bytes. Raises `WorkloadError`."""
    return _of_all(_digests(root, digest_of))


def _digests(root: Path, digest_of: Callable[[Path], str] | None) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if len(files) > _MOST_FILES or any(not path.resolve().is_relative_to(root.resolve()) for path in files):
        raise WorkloadError("The bundle holds too many files, or links out of itself.", remedy="Copy it as it came.")
    return {str(path.relative_to(root)): (digest_of or _sha256)(path) for path in files}


def _of_all(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name}\0{value}\n" for name, value in digests.items()).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_weights(root: Path, name: str, digests: Mapping[str, str]) -> None:
    if name not in digests:
        raise NotFoundError(f"The bundle has no {name}.", remedy="Download it: large_files.yml says from where.")
    _compare_with_list(root, name)
    if not zipfile.is_zipfile(root / name):
        raise WorkloadError(
            f"{name} is a bare pickle: reading it would run what it says.",
            remedy="Save the state_dict again with torch.save (PyTorch ≥ 1.6) from a place you trust.",
        )


def _compare_with_list(root: Path, name: str) -> None:
    """The bundle's own list of large files, where it has one."""
    import yaml

    listed = root / "large_files.yml"
    rows = (yaml.safe_load(listed.read_text(encoding="utf-8")) or {}).get("large_files", ()) if listed.is_file() else ()
    for row in rows:
        kind, value = str(row.get("hash_type") or ""), str(row.get("hash_val") or "")
        if row.get("path") != name or not value:
            continue
        if kind not in ("md5", "sha1", "sha256", "sha512"):
            raise WorkloadError(f"large_files.yml gives {kind!r} of {name}, which is not known.")
        with (root / name).open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != value:
            raise WorkloadError(
                f"{name} has {kind} {found}, not {value} as large_files.yml says.", remedy="Download the weights again."
            )


def title(bundle: Checked) -> tuple[str, str]:
    """Name and version as `metadata.json` has them; nothing in it is run."""
    try:
        row = json.loads((bundle.root / "configs" / "metadata.json").read_text(encoding="utf-8"))
        return str(row.get("name") or bundle.root.name)[:64], str(row.get("version") or "unknown")[:64]
    except (OSError, ValueError, AttributeError):
        return "MONAI bundle", "unknown"


def allowed() -> frozenset[str]:
    """Digests whose code runs unsealed. Raises `WorkloadError` where a list cannot be read."""
    import yaml

    places = [Path(str(resources.files("permed_compute.cluster"))) / "bundles.yaml"]
    if os.environ.get(ALLOWED):
        places.append(Path(os.environ[ALLOWED]))
    found: set[str] = set()
    for place in places:
        try:
            rows = (yaml.safe_load(place.read_text(encoding="utf-8")) or {}).get("allowed") or {}
        except (OSError, AttributeError, yaml.YAMLError):
            raise WorkloadError("The list of allowed bundles cannot be read.", remedy=f"Mend {place.name}.") from None
        found |= {str(digest) for digest in rows}
    return frozenset(found)


# ------------------------------------------------------------------------------------------------ the bundle, open


@dataclass(frozen=True, slots=True)
class Variant:
    """A precision variant, the type of machine on which it was chosen ('' for eager), and its tolerance."""

    name: str = precision.EAGER
    machine: str = ""
    tolerance: float = precision.TOLERANCE


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the bundle's preprocessing made of an image."""

    item: dict[str, Any] = field(repr=False)


class Runner(Protocol):
    """A bundle that is loaded and stays so from study to study."""

    is_sealed: bool

    def prepare(self, image: Path) -> Path | Prepared:
        """What can be done of `segment` while another study is segmented; `image` is consumed."""
        ...

    def segment(self, image: Path | Prepared, shape: Sequence[int], affine: np.ndarray, variant: Variant) -> Segmented:
        """Labels on the voxels of a NIfTI of this shape and affine (RAS, mm), which is consumed, or was prepared."""
        ...

    def probabilities(self, image: Path | Prepared) -> dict[str, float]:
        """Of each class that the bundle answers for, 0 to 1, for a NIfTI, which is consumed, or was prepared."""
        ...

    def calibrate(self, tolerance: float) -> Mapping[str, Any]:
        """The fastest variant within the tolerance on this machine: `precision.Choice` as a dict."""
        ...

    def close(self) -> None: ...


class Plain:
    """The bundle in this process. What it says is run: only for digests that are trusted, or inside a sealed one."""

    is_sealed = False

    def __init__(self, root: Path, options: Options, *, device: str, threads: int, scratch: Path) -> None:
        import torch
        from monai.bundle.config_parser import ConfigParser

        torch.set_num_threads(max(1, threads))
        self.options, self.device, self.scratch = options, torch.device(device), scratch
        compile_anew(root)
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))  # a bundle's own `scripts`
        self.parser = ConfigParser()
        self.parser.read_config(root / CONFIG)
        raw = self.parser.get()
        missing = [key for key in _NEEDED[options.answers] if key not in raw]
        if missing:
            raise WorkloadError(
                f"inference.json has no {' and no '.join(missing)}.",
                remedy="See MONAI's bundle specification."
                if options.answers == LABELS
                else "Give a bundle of radiology/train-classification; radiology/segment runs those that segment.",
            )
        self.parser.update({"bundle_root": str(root), "device": f"$torch.device({device!r})"})
        if "output_dir" in raw:
            self.parser.update({"output_dir": str(scratch / "saved")})
        self.preprocessing = self._content("preprocessing")
        self._preparing = Lock()
        if options.answers == PROBABILITIES:
            self.networks = [_loaded(self._content("network"), root / options.weights[0], self.device)]
            return
        self.decision, self.late = _decision(raw.get("postprocessing"))
        self.windows = _windows(self._content("inferer"))
        self.networks = [self._network(root / name) for name in options.weights]
        self.machine = precision.machine(device, threads)
        self._clocks: dict[str, precision.Clock] = {}

    def _content(self, key: str) -> Any:
        return self.parser.get_parsed_content(key)

    def _network(self, weights: Path) -> Any:
        from copy import deepcopy

        network = deepcopy(self._content("network_def"))  # the parser gives the same one again for an ensemble
        return _loaded(network, weights, self.device)

    def prepare(self, image: Path) -> Prepared:
        with self._preparing:  # MONAI's transforms do not promise to run beside themselves
            item = self.preprocessing({"image": str(image)})
        image.unlink(missing_ok=True)
        return Prepared(item)

    def segment(
        self, image: Path | Prepared, shape: Sequence[int], affine: np.ndarray, variant: Variant = Variant()
    ) -> Segmented:
        item = (image if isinstance(image, Prepared) else self.prepare(image)).item
        clock = self._clock(variant)
        before = clock.seconds
        data = item["image"]
        if self.decision is None or self.windows is None:
            return Segmented(self._whole(item, shape, clock), (), False, False, clock.seconds - before)
        frame = Frame.of(np.asarray(data.affine), tuple(data.shape[1:]), affine, shape)
        tensor = data.as_tensor().float().to(self.device)
        found, used = sliding.fitting(self.windows, lambda windows: self._stream(tensor, windows, frame, clock))
        roi = tuple(r if r > 0 else n for r, n in zip(used.roi_size, tensor.shape[1:], strict=True))
        shrunk = used.roi_size != self.windows.roi_size
        return Segmented(frame.back(found), roi, shrunk, True, clock.seconds - before)

    def probabilities(self, image: Path | Prepared) -> dict[str, float]:
        import torch

        item = (image if isinstance(image, Prepared) else self.prepare(image)).item
        with torch.inference_mode():
            found = self._content("probabilities")(item)
        return probabilities_of(dict(zip(self._content("classes"), found, strict=True)))

    def _clock(self, variant: Variant) -> precision.Clock:
        """The predictor of a variant; one that was chosen on another type of machine must first show its labels here.

        Raises `WorkloadError` where they differ by more than the tolerance.
        """
        if variant.name not in self._clocks:
            predict = self._predictor(variant.name)
            if variant.name != precision.EAGER and variant.machine != self.machine:
                off = precision.deviation(predict, self._predictor(precision.EAGER), self._probe())
                if off > variant.tolerance:
                    raise WorkloadError(
                        f"Variant {variant.name} differs from eager in {off:.2g} of the labels on this machine,"
                        f" more than {variant.tolerance:g}.", remedy="Write `variant: eager`.",
                    )  # fmt: skip
            self._clocks[variant.name] = precision.Clock(predict, self.device)
        return self._clocks[variant.name]

    def _predictor(self, variant: str) -> sliding.Predict:
        mean = sliding.ensemble([precision.apply(network, variant, str(self.device)) for network in self.networks])
        flips = ((), *(flip for flip in self.options.flips if flip))
        return sliding.flipped(mean, flips) if len(flips) > 1 else mean

    def _probe(self) -> Any:
        first = next(p for p in self.networks[0].parameters() if p.ndim == 5)
        roi = self.windows.roi_size if self.windows is not None and min(self.windows.roi_size) > 0 else (96, 96, 96)
        return precision.probe(int(first.shape[1]), roi, str(self.device))

    def calibrate(self, tolerance: float) -> Mapping[str, Any]:
        variants = {name: self._predictor(name) for name in precision.VARIANTS}
        choice = precision.choose(
            variants, self._probe(), tolerance=tolerance, machine=self.machine, clock=time.perf_counter
        )
        return choice.as_dict()

    def _stream(self, tensor: Any, windows: Windows, frame: Frame, clock: precision.Clock) -> np.ndarray:
        grid = None if self.late else frame.grid
        found = sliding.labels(
            tensor, clock, windows, grid=grid, decision=self.decision, keep_bytes=self.options.keep_bytes,
            scratch=self.scratch,
        )  # fmt: skip
        return sliding.nearest(found, frame.grid) if self.late else found

    def _whole(self, item: dict[str, Any], shape: Sequence[int], clock: precision.Clock) -> np.ndarray:
        """As MONAI's evaluator: the whole logits, then the bundle's own postprocessing."""
        import torch

        with torch.inference_mode():
            out = self._content("inferer")(inputs=item["image"][None].to(self.device), network=clock)
        item["pred"] = out[0]
        if "postprocessing" in self.parser.get():
            item = self._content("postprocessing")(item)
        found = np.asarray(item["pred"].cpu())
        if found.shape != (1, *shape):
            raise WorkloadError(
                f"The bundle's postprocessing ends with {found.shape}, not one map of labels on the source's voxels.",
                remedy="It must invert its preprocessing and decide for one label per voxel.",
            )
        return np.asarray(found[0], np.uint8 if found.max() <= 255 else np.int16)

    def close(self) -> None:
        self.networks.clear()


def _loaded(network: Any, weights: Path, device: Any) -> Any:
    """The network with these weights. Raises `WorkloadError` where they are another's."""
    state = _state_dict(weights)
    try:
        network.load_state_dict(state)
    except RuntimeError:
        raise WorkloadError(
            f"{weights.name} does not fit the bundle's network.", remedy="Give the weights that belong to it."
        ) from None
    return network.to(device).eval()


def probabilities_of(found: Any) -> dict[str, float]:
    """What a bundle answered, as it may leave. Raises `WorkloadError` for anything but numbers from 0 to 1 by class."""
    good = isinstance(found, dict) and 0 < len(found) <= _MOST_CLASSES
    for name, value in found.items() if good else ():
        good &= isinstance(name, str) and name.isprintable() and 0 < len(name) <= _LONGEST_CLASS
        good &= isinstance(value, float | int) and 0 <= value <= 1
    if not good:
        raise WorkloadError("The bundle's answer is not a probability for each of its classes.")
    return {name: float(value) for name, value in found.items()}


def _state_dict(path: Path) -> Any:
    """Tensors only: whatever else a pickle would make is refused. Raises `WorkloadError`."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise WorkloadError(
            f"{path.name} holds pickled objects or code, not tensors only.",
            remedy="Save the network's state_dict with torch.save.",
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return state[key]
    return state


def _windows(inferer: Any) -> Windows | None:
    """The bundle's windows; None where its inferer is of a kind that we do not stream."""
    from monai.inferers.inferer import SimpleInferer, SlidingWindowInferer

    if type(inferer) is SimpleInferer:
        return Windows((-1, -1, -1))
    if type(inferer) is not SlidingWindowInferer:
        return None
    roi, overlap = (_three(value) for value in (inferer.roi_size, inferer.overlap))
    mode = "gaussian" if str(getattr(inferer.mode, "value", inferer.mode)) == "gaussian" else "constant"
    sigma = inferer.sigma_scale if isinstance(inferer.sigma_scale, int | float) else inferer.sigma_scale[0]
    padding = str(getattr(inferer.padding_mode, "value", inferer.padding_mode))
    x, y, z = (int(r or -1) for r in roi)
    return Windows(
        (x, y, z), (float(overlap[0]), float(overlap[1]), float(overlap[2])), mode,  # type: ignore[arg-type]
        float(sigma), int(inferer.sw_batch_size), padding, float(inferer.cval),
    )  # fmt: skip


def _three(value: Any) -> Sequence[Any]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3


def _decision(postprocessing: Any) -> tuple[Decision | None, bool]:
    """What the bundle's postprocessing decides, and whether it does so before it resamples; None: more than that."""
    if postprocessing is None:
        return Decision(), False
    steps = postprocessing.get("transforms") if isinstance(postprocessing, Mapping) else None
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        return None, False
    order: list[str] = []
    activation, kind, threshold, smooth = "none", "", 0.5, True
    for step in steps:
        name = str(step.get("_target_")).rpartition(".")[2]
        if name in ("Activations", "Activationsd"):
            activation = "softmax" if step.get("softmax") else "sigmoid" if step.get("sigmoid") else "other"
            order.append("activate")
        elif name == "Invertd":
            smooth = step.get("nearest_interp", True) is False
            order.append("invert")
        elif name in ("AsDiscrete", "AsDiscreted"):
            kind = "argmax" if step.get("argmax") is True else "threshold"
            threshold = step.get("threshold", 0.5)
            order.append("decide")
        elif name not in _PASSING:
            return None, False
    late = order.index("decide") < order.index("invert") if {"decide", "invert"} <= {*order} else False
    plain = [name for name in order if name != "activate"]
    first = "activate" not in order or order[0] == "activate"
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if plain.count("decide") != 1 or plain.count("invert") != 1 or not first or smooth == late or not number:
        return None, False
    if activation == "other" or (kind == "threshold" and activation == "softmax"):
        return None, False
    return Decision(kind, activation, float(threshold)), late  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Frame:
    """How the source's voxels lie in the network's grid: parallel axes, swapped, reversed, scaled and moved."""

    grid: Grid
    axes: tuple[int, ...]
    """Of the source, in the order of the network's."""
    reversed: tuple[int, ...]
    """Of the network's axes, those along which the source runs the other way."""

    @classmethod
    def of(cls, network: np.ndarray, size: Sequence[int], source: np.ndarray, shape: Sequence[int]) -> Frame:
        """Both affines map indices to mm in RAS. Raises `WorkloadError` where the axes are not parallel."""
        to = np.linalg.inv(network) @ source
        axes = tuple(int(np.abs(row).argmax()) for row in to[:3, :3])
        rest = np.abs(to[:3, :3]) * np.asarray(shape)
        rest[np.arange(3), axes] = 0
        if sorted(axes) != [0, 1, 2] or rest.max() > _DRIFT:
            raise WorkloadError(
                "The bundle's preprocessing turns the image; its grid is not parallel to the source's.",
                remedy="Only orientation, spacing, cropping and padding can be undone while streaming.",
            )
        scale = [float(to[row, axis]) for row, axis in enumerate(axes)]
        lengths = [int(shape[axis]) for axis in axes]
        offset = [
            float(to[row, 3]) + (s * (n - 1) if s < 0 else 0.0)
            for row, (s, n) in enumerate(zip(scale, lengths, strict=True))
        ]
        x, y, z = (_whole_number(abs(s)) for s in scale)
        i, j, k = (_whole_number(o) for o in offset)
        grid = Grid((lengths[0], lengths[1], lengths[2]), (x, y, z), (i, j, k))
        return cls(grid, axes, tuple(row for row, s in enumerate(scale) if s < 0))

    def back(self, found: np.ndarray) -> np.ndarray:
        """Labels on `grid`, in the source's order and direction of axes."""
        return np.ascontiguousarray(np.flip(found, self.reversed).transpose(np.argsort(self.axes)))


def _whole_number(value: float) -> float:
    """Affines in float32 miss whole numbers by a hair; a voxel that lies on another is not interpolated."""
    return float(round(value)) if abs(value - round(value)) < 1e-4 else value
