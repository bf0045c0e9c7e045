"""The report page: what the fusion can, what each modality can alone, what rests on what, and what is simulated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permed_compute.paths import replacing
from permed_compute.reports.charts import Step, steps
from permed_compute.reports.html import render

PAGE = "fusion.html"
_TONES = {"low": "accent", "middle": "warn", "high": "bad"}
TITLES = {
    "harrell_c": "Harrell's C", "uno_c": "Uno's C", "ibs": "Integrated Brier score", "auroc": "AUROC", "brier": "Brier",
}  # fmt: skip


def write(report: Mapping[str, Any], path: Path) -> None:
    """One file, with everything in it."""
    lines = [
        Step(
            f"{name} risk", row["time"], row["survival"], f"{row['people']} people, {row['events']} events",
            _TONES[name],
        )
        for name, row in report.get("groups", {}).get("curves", {}).items()
    ]  # fmt: skip
    curves = steps(lines, "Without the event, by thirds of the held-out risk", unit=report["unit_of_time"])
    page = render("fusion.html.j2", report=report, curves=curves if lines else "", titles=TITLES)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
