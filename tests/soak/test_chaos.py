from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from permed_compute.testing.cluster import networks_possible


def run(script: str, *words: str, seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *words], capture_output=True, text=True, timeout=seconds
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", ["1", "2"])
def test_twenty_kills_lose_and_repeat_nothing(seed: str) -> None:
    run("kills.py", "--seed", seed, seconds=1700)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not networks_possible(), reason="network namespaces need root and `ip`")
def test_ten_minutes_of_everything_break_no_promise() -> None:
    run("chaos.py", "--minutes", "10", "--seed", "1", seconds=1700)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_storms_break_no_promise() -> None:
    run("faults.py", "--runs", "10000", "--seed", "1", seconds=3500)
