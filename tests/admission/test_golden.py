"""Golden traces: the same decisions and figures to the byte, in any process, whatever its hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_golden_traces_to_the_byte_whatever_the_hash_seed() -> None:
    golden = json.loads((HERE / "golden_traces.json").read_text(encoding="utf-8"))
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / "golden_traces.py")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "4711")
    ]
    told = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert told[0] == told[1], "the order of a set or of hashes decides something"
    assert told[0] == golden, "decisions or figures have changed; if that is meant, write golden_traces.json anew"
