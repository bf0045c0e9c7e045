"""A slide of 100,000 × 100,000 pixels, mostly glass that was never scanned, on Ray by a worker of 2 GiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from permed_compute.cli.exits import Exit
from permed_compute.workloads.pathology import geojson
from tests.workloads.pathology.made import pixels

EDGE, TILE, ISLAND = 100_000, 256, 9


def write_sparse(path: Path, islands: int = 80) -> int:
    """A BigTIFF at 0.25 µm without a level but the first; islands of tissue, no bytes elsewhere. Returns its tiles."""
    import simplejpeg
    import tifffile

    tissue = pixels(ISLAND * TILE, ISLAND * TILE)
    cut = [tissue[y : y + TILE, x : x + TILE] for y in range(0, len(tissue), TILE) for x in range(0, len(tissue), TILE)]
    stored = [bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(part), 85, "RGB", "444")) for part in cut]
    across, random = -(-EDGE // TILE), np.random.default_rng(0)
    where: dict[tuple[int, int], bytes] = {}
    for row, column in random.integers(0, across - ISLAND, (islands, 2)).tolist():
        where |= {(row + k // ISLAND, column + k % ISLAND): stream for k, stream in enumerate(stored)}

    def tiles() -> Iterator[bytes]:
        for row in range(across):
            for column in range(across):
                yield where.get((row, column), b"")

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(), shape=(EDGE, EDGE, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr", compression="jpeg",
            subsampling=(1, 1), resolution=(40_000, 40_000), resolutionunit=3, metadata=None,
        )  # fmt: skip
    return len(where)


def ran(folder: Path, name: str, params: dict[str, object]) -> tuple[Path, int]:
    """The results of a job over `folder/in` by one worker of 2 GiB on Ray, and its peak in MiB."""
    (folder / "job.json").write_text(json.dumps({
        "version": 1, "name": "sparse", "workload": name, "inputs": [{"path": str(folder / "in")}],
        "params": params, "account": "local", "resources": {"workers": 1, "cpus": 2, "memory": "2GiB"},
    }))  # fmt: skip
    environment = os.environ | {
        "PERMED_HOME": str(folder / "home"), "PERMED_ANCHOR": str(folder / "anchor"), "PERMED_EXECUTOR": "ray",
        "PERMED_TRACKING_URI": "none",
    }  # fmt: skip
    command = [sys.executable, "-m", "permed_compute.cli", "run", "--json", str(folder / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == Exit.OK, done.stderr[-2000:]
    [ended] = json.loads(done.stdout)["jobs"]
    results = Path(ended["results"])
    return results, json.loads((results / "manifest.json").read_text())["usage"]["rss_peak_mib"]


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_huge_sparse_slide_takes_less_than_two_gibibytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = write_sparse(tmp_path / "in" / "sparse.tiff")
    results, peak = ran(tmp_path, "pathology/encode", {"target_mpp": 0.5, "size": 224})
    result = json.loads((results / "result.json").read_text())
    print(f"\n{EDGE} × {EDGE} pixels, {count} stored tiles, {result['values']['tiles']} encoded: peak {peak} MiB")
    assert result["values"]["tiles"] > 600 and peak < 2048  # more than one block


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_huge_sparse_slide_is_segmented_in_less_than_two_gibibytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = write_sparse(tmp_path / "in" / "sparse.tiff", islands=16)
    results, peak = ran(tmp_path, "pathology/segment", {"model": "nuclei"})
    [merged] = [path for path in (results / "parts").iterdir() if path.name.endswith("-merged")]
    objects = sum(1 for _ in geojson.read(merged / "objects.geojson"))
    told = json.loads((results / "result.json").read_text())["values"]["objects"]
    print(f"\n{EDGE} × {EDGE} pixels, {count} stored tiles, {objects} nuclei: peak {peak} MiB")
    assert objects == told > 10_000 and peak < 2048
