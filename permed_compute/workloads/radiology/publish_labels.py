"""The bundle of a network that labels voxels."""

from __future__ import annotations

from collections.abc import Mapping

from permed_compute.workloads.radiology import publish
from permed_compute.workloads.radiology.publish import WORDS, Card, Made, Training, estimate
from permed_compute.workloads.radiology.scores import METRICS


def made(told: Training, structures: Mapping[int, str], patch: int, overlap: float) -> Made:
    """structures: names by label. patch, overlap: windows, in voxels and as a share."""
    return Made(
        _inference(told, patch, overlap), _metadata(told, structures, patch), publish.card(told, _card(told, structures,
        patch)),
    )  # fmt: skip


def _inference(told: Training, patch: int, overlap: float) -> dict[str, object]:
    predict = "@inferer(item['image'][None].to(@device), @network)[0].cpu()"
    return publish.inference(told, [], {
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": [patch] * 3, "sw_batch_size": 1, "overlap": overlap,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                 "nearest_interp": False, "to_tensor": True},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "separate_folder": False,
                 "output_dtype": "uint8"},
            ],
        },
        "run": ["$[@postprocessing({**item, 'pred': " + predict + "}) and None for item in @dataset]"],
    })  # fmt: skip


def _metadata(told: Training, structures: Mapping[int, str], patch: int) -> dict[str, object]:
    names = {"0": "background", **{str(label): name for label, name in structures.items()}}
    return publish.metadata(
        told, "segmentation", f"Segments {', '.join(structures.values())}.", patch, told.network["in_channels"],
        {"type": "image", "spatial_shape": [patch] * 3, "dtype": "float32", "format": "segmentation",
         "num_channels": told.network["out_channels"], "value_range": [0, len(structures)], "is_patch_data": True,
         "channel_def": names},
    )  # fmt: skip


def _card(told: Training, structures: Mapping[int, str], patch: int) -> Card:
    spacing = " × ".join(f"{length:g}" for length in told.spacing)
    rows = []
    for label, name in structures.items():
        row = told.report["models"][told.name]["structures"][str(label)]
        counts = (str(row["counts"][outcome]) for outcome in ("found", "missed", "invented", "absent"))
        rows.append((name, *(estimate(row[metric]) for metric in METRICS), *counts))
    columns = ("structure", *(WORDS[metric] for metric in METRICS), "found", "missed", "invented", "rightly absent")
    return Card(
        does=f"Segments {', '.join(structures.values())}",
        what="scans",
        seen=f"patches of {patch}³ voxels at {spacing} mm",
        loss="Dice + cross entropy",
        read="Missed and invented structures score Dice 0, NSD 0 and the diagonal of the field of view, and are in"
        " every mean.",
        figures=publish.table(columns, rows),
        limits=(
            f"Scans were all about {spacing} mm; others are resampled to that first.",
            f"Intensities outside {told.intensity[0]:g} to {told.intensity[1]:g} are clipped.",
        ),
    )
