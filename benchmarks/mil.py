"""Training on bags of features and writing heatmaps, beside a plain PyTorch loop over HDF5, and zarr with shapely."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case
from permed_compute.workloads.pathology import features

TITLE = "Multiple-instance learning"
WHY = (
    "A cohort is trained on for many epochs, and each reads every bag. 4,000 tiles × 1024 a bag, ABMIL (512, 256),"
    " AdamW, one epoch on the device that is there; the peer is the published way: HDF5 in chunks of 32, float32, a bag"
    " a step. `read`: bags to a batch, nothing computed. Goal: read 4 times as many bags a second, train no fewer, and"
    " write a heatmap of 15,000 tiles (OME-Zarr and GeoJSON) in half the time of zarr-python and shapely. Warm."
)
_DIM, _TILES, _BATCH = 1024, 4000, 4
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def cases(quick: bool) -> list[Case]:
    count, tiles = (4, 200) if quick else (16, _TILES)
    spots = 500 if quick else 15_000
    return [
        Case("bags read", "ours, float16 Zarr, batches of 4", "bags/s", "higher", lambda: _read_ours(count, tiles),
             goal="≥ 4 × HDF5", ratio=4.0),
        Case("bags read", "HDF5, a bag at a time", "bags/s", "higher", lambda: _read_h5(count, tiles), peer=True),
        Case("bags trained on", "ours", "bags/s", "higher", lambda: _train_ours(count, tiles),
             goal="≥ the plain loop", ratio=1.0),
        Case("bags trained on", "plain PyTorch loop, HDF5", "bags/s", "higher", lambda: _train_plain(count, tiles),
             peer=True),
        Case("heatmap, ms", "ours", "ms", "lower", lambda: _heat_ours(spots), goal="≤ 1/2 of zarr + shapely",
             ratio=0.5),
        Case("heatmap, ms", "zarr-python, shapely, json", "ms", "lower", lambda: _heat_others(spots), peer=True),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ bags


@cache
def _written(count: int, tiles: int) -> Path:
    import h5py

    kept = tempfile.TemporaryDirectory(prefix="permed-bench-mil-")
    _KEPT.append(kept)
    root = Path(kept.name)
    for k in range(count):
        values = np.random.default_rng(k).normal(0, 1, (tiles, _DIM)).astype(np.float16)
        features.write_chunk(root / f"part{k}", values, tiles)
        facts = {
            "target_mpp": 0.5, "patch_size": 224, "encoder": "e", "encoder_digest": "0", "overlap": 0, "mpp": [0.5, 0.5]
        }  # fmt: skip
        features.assemble(
            root / f"{_name(k)}.zarr", np.zeros((tiles, 2)), [root / f"part{k}" / features.CHUNK], block=tiles,
            dim=_DIM, encoder="e", facts=facts,
        )  # fmt: skip
        shutil.rmtree(root / f"part{k}")
        with h5py.File(root / f"{k}.h5", "w") as file:
            file.create_dataset("features", data=values.astype(np.float32), chunks=(32, _DIM), maxshape=(None, _DIM))
    return root


def _name(k: int) -> str:
    return f"slide-{k:016x}"


def _bags(root: Path, count: int, tiles: int) -> Any:
    from permed_compute.workloads.pathology.cohort import Bags, Patient, Slide

    people = [
        Patient(f"p{k}", f"p{k}", "", (Slide(_name(k), root / f"{_name(k)}.zarr"),), {"label": "ab"[k % 2]})
        for k in range(count)
    ]
    return Bags(people, {_name(k): tiles for k in range(count)})


def _model() -> Any:
    import torch

    from permed_compute.workloads.pathology import mil

    torch.manual_seed(0)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    definition = {"model": "abmil", "dim": _DIM, "outputs": 2, "hidden": 512, "attention": 256, "dropout": 0.0}
    return mil.build(definition).to(device), device


def _head(people: Any) -> Any:
    from permed_compute.workloads.pathology.heads import Head

    return Head.fit("classification", people, people, 0)


def _read_ours(count: int, tiles: int) -> float:
    from permed_compute.workloads.pathology.train import Padded

    bags = _bags(_written(count, tiles), count, tiles)
    collate = Padded(_head(bags.cohort).targets(bags.cohort))
    began = time.perf_counter()
    seen = sum(
        collate([bags[k] for k in range(first, min(count, first + _BATCH))])["x"].shape[0]
        for first in range(0, count, _BATCH)
    )
    return seen / (time.perf_counter() - began)


def _read_h5(count: int, tiles: int) -> float:
    import h5py
    import torch

    root = _written(count, tiles)
    began = time.perf_counter()
    for k in range(count):
        with h5py.File(root / f"{k}.h5") as file:
            if torch.from_numpy(file["features"][:]).shape != (tiles, _DIM):
                raise ValueError("another bag than was written")
    return count / (time.perf_counter() - began)


def _train_ours(count: int, tiles: int) -> float:
    import torch

    from permed_compute.learning.training import Pace, Recipe, fit
    from permed_compute.spec import JobSpec
    from permed_compute.testing.context import LocalContext
    from permed_compute.workloads.pathology.train import Padded, loss_of

    bags = _bags(_written(count, tiles), count, tiles)
    model, device = _model()
    head = _head(bags.cohort)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    recipe = Recipe(model, bags, loss_of(head), optimizer, collate=Padded(head.targets(bags.cohort)))
    with tempfile.TemporaryDirectory() as folder:
        ctx = LocalContext(Path(folder), JobSpec(name="b", workload="pathology/train-mil"), device=device)
        began = time.perf_counter()
        done = fit(recipe, Pace(epochs=1, batch=_BATCH, micro=_BATCH, checkpoint_s=0), ctx)
        took = time.perf_counter() - began
    if done is None or done.steps != count // _BATCH:
        raise ValueError("not every bag was trained on")
    return count / took


def _train_plain(count: int, tiles: int) -> float:
    import h5py
    import torch
    from torch.nn.functional import cross_entropy

    root = _written(count, tiles)
    model, device = _model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    began = time.perf_counter()
    for k in torch.randperm(count).tolist():
        with h5py.File(root / f"{k}.h5") as file:
            x = torch.from_numpy(file["features"][:])[None].to(device)
        optimizer.zero_grad(set_to_none=True)
        answer = model(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device))
        loss = cross_entropy(answer.logits, torch.tensor([k % 2], device=device))
        loss.backward()
        optimizer.step()
        float(loss.detach())
    return count / (time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------ a heatmap


def _heat(count: int) -> Any:
    from permed_compute.workloads.pathology.heatmap import Heat

    across = int(count**0.5) + 1
    coords = np.stack([np.arange(count) % across, np.arange(count) // across], 1) * 448
    facts = {
        "target_mpp": 0.5, "patch_size": 224, "patch_size_level0": 448, "overlap": 0, "mpp": [0.25, 0.25],
        "level0_width": across * 448, "level0_height": (coords[-1, 1] // 448 + 1) * 448,
    }  # fmt: skip
    facts["level0_height"] = int(facts["level0_height"])
    return Heat(coords, np.random.default_rng(0).exponential(1, count).astype(np.float32), facts)


def _heat_ours(count: int) -> float:
    from permed_compute.workloads.pathology import heatmap

    heat = _heat(count)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        heatmap.write_zarr(Path(folder) / "a.zarr", heat)
        heatmap.write_geojson(Path(folder) / "a.geojson", heat)
        took = time.perf_counter() - began
        _check(Path(folder) / "a.geojson", count)
    return 1000 * took


def _heat_others(count: int) -> float:
    import zarr
    from shapely.geometry import box, mapping

    heat = _heat(count)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        grid = heat.laid_out(heat.relative)
        group = zarr.open_group(Path(folder) / "a.zarr", mode="w")
        group.create_array("0", data=grid, chunks=(256, 256), compressors=None)
        rows = [
            {
                "type": "Feature", "geometry": mapping(box(x, y, x + 448, y + 448)),
                "properties": {"objectType": "tile", "classification": {"name": "Attention", "color": [200, 0, 0]},
                               "measurements": {"Attention": float(value)}},
            }
            for (x, y), value in zip(heat.coords.tolist(), heat.relative, strict=True)
        ]  # fmt: skip
        with (Path(folder) / "a.geojson").open("w", encoding="utf-8") as file:
            json.dump({"type": "FeatureCollection", "features": rows}, file)
        took = time.perf_counter() - began
        _check(Path(folder) / "a.geojson", count)
    return 1000 * took


def _check(path: Path, count: int) -> None:
    if len(json.loads(path.read_text(encoding="utf-8"))["features"]) != count:
        raise ValueError("not every tile is in the GeoJSON")
