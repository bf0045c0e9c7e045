"""A batch of studies through queue, admission and worker: how much of the wall time is the network's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs.home import disk_folder, new_home
from permed_compute.client import Client, open_client
from permed_compute.errors import NotFoundError
from permed_compute.execution import records
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

TITLE = "A batch of studies"
WHY = (
    "DICOM series of heads at 2 mm, segmented by a MONAI bundle (UNet of 16-32-64 channels, residual units, windows of"
    " 96, untrained) to SEG, NIfTI and picture; from the first part's start to the last publication. Decoding goes on"
    " while the network runs; what is left beside it is preprocessing, deciding, writing. Goal: at most 15 %. Workers"
    " are threads of one process here, of one CPU each. Where CUDA is present, the same on it, at full resolution."
)


_REPEATS = 2
"""A run of 50 studies takes a minute on a CPU; a few studies warm up as well."""


def cases(quick: bool) -> list[Case]:
    studies, few, edge = (3, 1, 40) if quick else (50, 3, 128)
    rig = _Rig()

    def case(group: str, name: str, unit: str, measure: Callable[[], float], **more: Any) -> Case:
        better = "lower" if unit in ("s", "%") and not more.pop("more", False) else "higher"
        kept = {"close": rig.close, "repeats": _REPEATS, "warm": lambda: 0.0} | more
        return Case(group, name, unit, better, measure, **kept)  # type: ignore[arg-type]

    def timed(name: str, workers: int, **more: Any) -> Case:
        warm = lambda: rig.run(few, edge, workers).wall_s  # noqa: E731
        return case(batch, name, "s", lambda: rig.run(studies, edge, workers).wall_s, warm=warm, **more)

    batch = f"{studies} studies"
    share = f"{batch}, share of wall time outside the network"
    gpu = f"{batch} on a GPU"
    full = 40 if quick else 0
    return [
        timed("one worker", 1, peer=True),
        timed("two workers", 2),
        case(share, "one worker", "%", lambda: rig.again(studies, edge, 1).outside, goal="≤ 15 %", limit=15),
        case(share, "two workers", "%", lambda: rig.again(studies, edge, 2).outside),
        case(gpu, "volumes per minute", "1/min", lambda: rig.on_gpu(rig.run, studies, full).per_minute,
             warm=lambda: rig.on_gpu(rig.run, few, full).per_minute),
        case(f"{gpu}, busy", "network's share of wall time", "%", more=True, goal="≥ 90 %", limit=90,
             measure=lambda: 100 - rig.on_gpu(rig.again, studies, full).outside),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Batch:
    studies: int
    workers: int
    wall_s: float
    network_s: float

    @property
    def outside(self) -> float:
        """% of the workers' wall time in which no network ran."""
        return 100 * (1 - self.network_s / self.workers / self.wall_s)

    @property
    def per_minute(self) -> float:
        return 60 * self.studies / self.wall_s


class _Rig:
    """Each run has a home of its own, or the ledger would answer."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._done: dict[tuple[int, int, int, bool], list[_Batch]] = {}

    def close(self) -> None:
        self._stack.close()

    def on_gpu(self, way: Callable[..., _Batch], studies: int, edge: int) -> _Batch:
        import torch

        if not torch.cuda.is_available():
            raise LeftOutError("there is no CUDA device")
        return way(studies, edge, 1, gpu=True)

    def again(self, studies: int, edge: int, workers: int, *, gpu: bool = False) -> _Batch:
        """A run that was timed, each in its turn: nothing is computed again."""
        known = self._done.get((studies, edge, workers, gpu), [])
        if not known:
            self.run(studies, edge, workers, gpu=gpu)
            known = self._done[studies, edge, workers, gpu]
        known.append(known.pop(0))
        return known[-1]

    def run(self, studies: int, edge: int, workers: int, *, gpu: bool = False) -> _Batch:
        images, bundle = self._made(studies, edge)
        kind = {"gpus": 1, "flavors": ["gpu"]} if gpu else {"flavors": ["cpu"]}
        resources = {"workers": workers, "cpus": 1, "memory": "4GiB", **kind}
        with new_home("inprocess") as settings:
            settings = settings.model_copy(update={"gpus": "auto"}) if gpu else settings
            with open_client(settings) as client:
                batch = self._batch(client, images, bundle, resources)
        self._done.setdefault((studies, edge, workers, gpu), []).append(batch)
        return batch

    def _batch(self, client: Client, images: Path, bundle: Path, resources: Mapping[str, Any]) -> _Batch:
        spec = JobSpec(
            name="batch", workload="radiology/segment",
            inputs=[{"path": str(images)}, {"path": str(bundle), "name": "bundle"}],
            params={"modalities": ["MR"], "segments": [{"label": "One", "code": ["1", "99PERMED", "One"]}]},
            resources=resources,
        )  # fmt: skip
        [job] = client.wait([job.id for job in client.submit(spec)])
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"The job ended {job.state}: {job.reason}, {job.detail.get('sentence', '')}")
        paths = client.paths(job)
        parts = read_json(paths.results / "result.json")["values"]["parts"]
        rows, _ = records.read(paths.attempt(job.attempt).records())
        done = [row for row in rows if row["kind"] == "part" and row["state"] == "DONE"]
        first = min(row["started"] for row in done) / 1000
        last = max(row["started"] / 1000 + row["seconds"] for row in done)
        return _Batch(len(done), resources["workers"], last - first, sum(part["network_s"] for part in parts.values()))

    def _made(self, studies: int, edge: int) -> tuple[Path, Path]:
        from permed_compute.workloads.radiology import sample

        if self._folder is None:
            self._folder = self._stack.enter_context(disk_folder())
            self._allow(_write_bundle(self._folder / "bundle"))
        images = self._folder / f"studies-{studies}-{edge}"
        if not images.exists():
            try:
                sample.write_sample(images, studies=studies, edge=edge or None)
            except NotFoundError:
                raise LeftOutError("no head is installed to make studies of (extra: demo)") from None
        return images, self._folder / "bundle"

    def _allow(self, root: Path) -> None:
        from permed_compute.workloads.radiology import bundle

        assert self._folder is not None
        listed = self._folder / "bundles.yaml"
        listed.write_text(f"allowed: {{{bundle.check(root).digest}: made here}}\n", encoding="utf-8")
        os.environ[bundle.ALLOWED] = str(listed)


def _write_bundle(root: Path) -> Path:
    """As it is published: preprocessing to 2 mm, windows of 96, softmax, inverted, argmax."""
    import torch

    try:
        from monai.networks.nets import UNet
    except ImportError:
        raise LeftOutError("MONAI is not installed (extra: radiology)") from None
    network: dict[str, Any] = {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [16, 32, 64], "strides": [2, 2],
        "num_res_units": 2,
    }  # fmt: skip
    key = {"keys": "image"}
    invert = {"transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False}
    made = {
        "network_def": {"_target_": "UNet", **network},
        "preprocessing": {"_target_": "Compose", "transforms": [
            {"_target_": "LoadImaged", **key}, {"_target_": "EnsureChannelFirstd", **key},
            {"_target_": "Orientationd", **key, "axcodes": "RAS"},
            {"_target_": "Spacingd", **key, "pixdim": [2.0, 2.0, 2.0], "mode": "bilinear"},
            {"_target_": "NormalizeIntensityd", **key, "nonzero": True},
        ]},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [96] * 3, "sw_batch_size": 1, "overlap": 0.5},
        "postprocessing": {"_target_": "Compose", "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {"_target_": "Invertd", "keys": "pred"} | invert,
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        ]},
    }  # fmt: skip
    for folder in ("configs", "models"):
        (root / folder).mkdir(parents=True)
    (root / "configs" / "inference.json").write_text(json.dumps(made), encoding="utf-8")
    torch.manual_seed(0)
    torch.save(UNet(**network).state_dict(), root / "models" / "model.pt")
    return root
