from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from permed_compute.testing.cluster import networks_possible


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not networks_possible(), reason="network namespaces need root and `ip`")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("loaders", [0, 2])
def test_a_training_interrupted_twenty_times_ends_with_the_same_bits(ranks: int, loaders: int) -> None:
    script = Path(__file__).with_name("gang.py")
    words = ["--ranks", str(ranks), "--loaders", str(loaders), "--seed", str(10 * ranks + loaders)]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=1700)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
