"""A gang on bare Ray Train that says when every rank has met the others: python bare_train.py ADDRESS FOLDER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def meet(config: dict[str, str]) -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        Path(config["stamp"]).write_text(repr(time.time()), encoding="ascii")


if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    began = time.time()
    stamp = Path(sys.argv[2]) / "met"
    trainer = TorchTrainer(
        meet, train_loop_config={"stamp": str(stamp)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"), run_config=RunConfig(storage_path=sys.argv[2], name="meet"),
    )  # fmt: skip
    trainer.fit()
    print(repr(float(stamp.read_text(encoding="ascii")) - began))
