"""One rank with two workers that read patches: says `ready` in the middle of an epoch, and ends with its input.

python ranks_read.py ours|cache ROWS PATCH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import radiology_training as training


def main() -> None:
    kind, rows, patch = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    if kind == "ours":
        batches = training.ours(rows, patch, batch=1, workers=2)
    else:
        from monai.data import CacheDataset

        dataset = CacheDataset(rows, training.read_and_cut(patch), progress=False)
        batches = training.loaded(dataset, batch=1, workers=2)
    for _ in batches:  # an epoch, so that every worker has read
        pass
    epoch = iter(batches)
    for _ in range(len(rows) - 1):
        next(epoch)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
