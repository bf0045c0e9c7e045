"""What a worklist computes with: the brain extraction that ships, or the MONAI bundle that the job names as an input.

Both are a `Network`: labels on a volume's own voxels, and the `Algorithm` that results are signed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from permed_compute.errors import Problem, SpecError
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context
from permed_compute.workloads.radiology import infer
from permed_compute.workloads.radiology.read import Volume

if TYPE_CHECKING:
    import numpy as np

    from permed_compute.workloads.radiology import bundle
    from permed_compute.workloads.radiology.outputs import Algorithm


class Network(Protocol):
    """A model, loaded and kept."""

    @property
    def algorithm(self) -> Algorithm:
        """Who signs, and what label 1, 2 … are."""
        ...

    def labels(self, volume: Volume) -> np.ndarray:
        """Bool, or labels from 0; shape and axes of `volume.array`. Raises `RefusedInput`."""
        ...


@dataclass(frozen=True, slots=True)
class Brain:
    """One structure, by probability above a threshold."""

    segmenter: infer.Segmenter
    threshold: float = 0.5

    @property
    def algorithm(self) -> Algorithm:
        from permed_compute.workloads.radiology.outputs import Algorithm

        model = self.segmenter
        return Algorithm(model.name, model.version, model.digest, f"threshold={self.threshold:g}")

    def labels(self, volume: Volume) -> np.ndarray:
        return self.segmenter.segment(volume, self.threshold)


@dataclass(frozen=True, slots=True)
class Bundled:
    """Whatever a bundle segments; `scratch` takes the volume as the file that its transforms read."""

    runner: bundle.Runner
    signed: Algorithm
    variant: bundle.Variant
    scratch: Path
    suv: bool = True
    """PET reaches the network in SUVbw."""

    @property
    def algorithm(self) -> Algorithm:
        return self.signed

    def labels(self, volume: Volume) -> np.ndarray:
        from permed_compute.workloads.radiology.pet import as_suv
        from permed_compute.workloads.radiology.studies import write_image

        if self.suv and volume.modality == "PT":
            volume, _ = as_suv(volume)
        image = self.scratch / "network.nii"
        write_image(volume, image)
        try:
            return self.runner.segment(image, volume.array.shape, volume.affine_ras, self.variant).labels
        finally:
            image.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ by the job


def is_bundled(spec: JobSpec) -> bool:
    return any(ref.name == "bundle" for ref in spec.inputs)


def params_of(given: Mapping[str, Any], *, bundled: bool) -> dict[str, Any]:
    """The network's parameters, as of radiology/brain-extraction or radiology/segment; JSON. Raises `SpecError`."""
    if not bundled:
        params = infer.Params.of(given)
        return {
            "threshold": params.threshold, "modalities": list(params.modalities),
            "accept_incomplete": params.accept_incomplete,
        }  # fmt: skip
    from permed_compute.workloads.radiology import segment

    found = segment.params_of(given)
    if found["variant"] == "auto":
        raise SpecError("params", [
            Problem("params.variant", "is auto, which measures first.", remedy="Name what radiology/segment chose.")
        ])  # fmt: skip
    if not found["segments"]:
        raise SpecError("params", [Problem("params.segments", "is empty; results need names and codes of the labels.")])
    return found


def load(spec: JobSpec, ctx: Context, params: Mapping[str, Any]) -> Network:
    """The job's network on the context's device."""
    if not is_bundled(spec):
        return Brain(infer.load_model(spec, ctx), params["threshold"])
    from permed_compute.spec import parse_memory
    from permed_compute.workloads.radiology import bundle, outputs, runners, segment

    checked = segment.checked_bundle(spec.model_copy(update={"params": dict(params)}), ctx)
    flips = tuple(tuple(flip) for flip in params["flips"])
    options = bundle.Options(tuple(params["weights"]), flips, parse_memory(params["keep_memory"]) << 20)
    runner = runners.loaded(checked, options, ctx)
    segments = tuple(outputs.Segment(row["label"], tuple(row["code"])) for row in params["segments"])
    name, version = bundle.title(checked)
    text = f"variant={params['variant']} flips={list(map(list, flips))} weights={len(params['weights'])}"
    label = segments[0].label if len(segments) == 1 else name
    signed = outputs.Algorithm(name, version, checked.digest, text, label[:16], segments)
    variant = bundle.Variant(params["variant"], "", params["tolerance"])
    return Bundled(runner, signed, variant, ctx.scratch, params["pet"] == "suv")


def digest(spec: JobSpec, ctx: Context, params: Mapping[str, Any]) -> str:
    """Of weights and code: part of every key."""
    if not is_bundled(spec):
        return infer.model_digest(spec, ctx)
    from permed_compute.workloads.radiology import segment

    return segment.checked_bundle(spec.model_copy(update={"params": dict(params)}), ctx).digest
