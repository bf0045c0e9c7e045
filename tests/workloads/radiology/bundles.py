"""MONAI bundles as they are published, small and untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPACING = [1.5, 1.5, 2.0]


def config(classes: int = 3, roi: int = 16, **changes: Any) -> dict[str, Any]:
    """`configs/inference.json` in the form of the model zoo's CT segmentation bundles (`$` expressions and all)."""
    made: dict[str, Any] = {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": classes, "channels": [4, 8],
            "strides": [2], "num_res_units": 1, "norm": "batch",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": SPACING, "mode": "bilinear"},
                {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 8000, "b_min": 0,
                 "b_max": 1, "clip": True},
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 4},
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": [roi, roi, roi], "sw_batch_size": 2, "overlap": 0.5,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                 "nearest_interp": False, "to_tensor": True},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
                      "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing"},
        "checkpointloader": {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'",
                             "load_dict": {"model": "@network"}},
        "initialize": ["$monai.utils.set_determinism(seed=123)", "$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    }  # fmt: skip
    return made | changes


def write_bundle(root: Path, made: dict[str, Any], seeds: tuple[int, ...] = (0,)) -> Path:
    """The folder of a bundle; `models/model.pt`, then `models/model1.pt` …, each from its seed."""
    import torch
    from monai.networks.nets import UNet

    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs" / "inference.json").write_text(json.dumps(made))
    (root / "configs" / "metadata.json").write_text(json.dumps({"name": "Made up", "version": "0.1.0"}))
    kwargs = {key: value for key, value in made["network_def"].items() if key != "_target_"}
    for number, seed in enumerate(seeds):
        torch.manual_seed(seed)
        torch.save(UNet(**kwargs).state_dict(), root / "models" / f"model{number or ''}.pt")
    return root
