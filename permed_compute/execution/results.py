"""The results folder of a job: what was computed, and a manifest that says what ran where and why.

    <job>/results/manifest.json  result.json  index.html  <files of reduce or train>  parts/<part>/<files>

Prepared in the attempt's folder and published by rename; an earlier attempt's results are replaced whole.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from permed_compute.execution.context import check_fence
from permed_compute.execution.port import Attempt
from permed_compute.execution.worker import Row, result_row, usage
from permed_compute.paths import write_json
from permed_compute.states import JobState, PartState
from permed_compute.storage.ledger import link_tree
from permed_compute.workloads.port import Result

_BAD = (PartState.FAILED.value, PartState.REFUSED.value)
_PACKAGES = (
    "ray", "torch", "monai", "pydicom", "highdicom", "openslide-python", "zarr", "dask", "numpy", "nibabel", "mlflow",
    "deepbet",
)  # fmt: skip


def publish(
    attempt: Attempt, staging: Path, *, result: Result | None, parts: list[Row], findings: list[Row],
    metrics: list[Row], stages: Mapping[str, float], used: Mapping[str, Any], engine: Mapping[str, Any], version: str,
    code_digest: str, model_digest: str, began: float,
) -> Row:  # fmt: skip
    """Complete `staging`, make it the job's results, and return the exit record."""
    bad = [row for row in parts if row["state"] in _BAD]
    outcome = JobState.FAILED if result is None else JobState.PARTIAL if bad else JobState.SUCCEEDED
    for row in parts:
        folder = row.pop("folder", None)
        names = [Path(name) for name in row.get("files", ())]
        if folder and row["state"] not in _BAD:
            link_tree(Path(folder), staging / "parts" / row["name"], names)
        row["files"] = [f"parts/{row['name']}/{name}" for name in names] if row["state"] not in _BAD else []
    body = result_row(result or Result())
    body |= {"outcome": outcome.value, "parts": parts, "findings": [*findings, *body["findings"]]}
    series: dict[str, list[list[float]]] = {}
    for row in metrics:
        series.setdefault(row["name"], []).append([row["step"], row["value"], row["t"]])
    body["series"] = series
    write_json(staging / "result.json", body)
    manifest = _manifest(attempt, outcome, stages, used, engine, version, code_digest, model_digest, began)
    manifest["inputs"] = [
        {"name": row["name"], "digest": row["input_digest"], "files": row["input_files"]} for row in parts
    ]
    write_json(staging / "manifest.json", manifest)
    _render(staging)
    check_fence(attempt.paths)
    _swap(staging, attempt.paths.job.results)
    counts = {state.value: sum(row["state"] == state for row in parts) for state in PartState}
    return {
        "outcome": outcome.value, "reason": "ended" if result else "no-part-succeeded",
        "sentence": _sentence(parts, bad), "counts": {name: count for name, count in counts.items() if count},
        "usage": manifest["usage"],
    }  # fmt: skip


def _sentence(parts: list[Row], bad: list[Row]) -> str:
    if not bad:
        return f"{len(parts)} part{'s' if len(parts) > 1 else ''} done." if parts else "Done."
    first = bad[0]
    return f"{len(bad)} of {len(parts)} parts have no result; first {first['name']}: {first.get('reason', '')}"


def _render(staging: Path) -> None:
    from permed_compute.reports.page import render_job_page

    render_job_page(staging)


def _swap(staging: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _manifest(
    attempt: Attempt, outcome: JobState, stages: Mapping[str, float], used: Mapping[str, Any],
    engine: Mapping[str, Any], version: str, code_digest: str, model_digest: str, began: float,
) -> Row:  # fmt: skip
    spec = attempt.spec
    mine = usage()
    devices = [
        {"worker": slot, "flavor": grant.flavor, "node": grant.node, "devices": list(grant.devices)}
        for slot, grant in enumerate(attempt.grants)
    ]
    return {
        "job": {
            "id": attempt.job_id, "name": spec.name, "attempt": attempt.number, "state": outcome.value,
            "account": spec.account, "band": spec.band.value, "purpose": spec.purpose.value,
            "data_class": spec.data_class.value,
        },
        "spec": spec.model_dump(mode="json"),
        "spec_digest": attempt.submitted or spec.digest(),
        "sets": dict(attempt.sets),
        "workload": {"name": spec.workload, "version": version, "model_digest": model_digest, "code": code_digest},
        "code": {"version": metadata.version("permed-compute"), **code_state()},
        "packages": packages(),
        "machine": machine(),
        "devices": devices,
        "why": attempt.why,
        "engine": dict(engine),
        "policy": attempt.policy,
        "seed": spec.seed,
        "stages": {name: round(seconds, 3) for name, seconds in stages.items()},
        "usage": {
            "wall_s": round(time.time() - began, 2),
            "cpu_s": round(mine["cpu_s"] + used.get("cpu_s", 0.0), 2),
            "rss_peak_mib": max(mine["rss_peak_mib"], used.get("rss_peak_mib", 0)),
        },
        "started_at": int(began * 1000),
        "ended_at": int(time.time() * 1000),
    }  # fmt: skip


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that decide results, where they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def machine() -> dict[str, Any]:
    """What kind of machine this is; no host name, which can name a person's laptop."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return {
        "platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count() or 1,
        "memory_mib": memory,
    }  # fmt: skip


@cache
def code_state() -> dict[str, Any]:
    """Commit of a checkout and whether it was changed since; empty for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return {}
