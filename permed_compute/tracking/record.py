"""From a job that ended to the record that tracking gets: parameters, metrics, timings, files, and no identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permed_compute.paths import JobPaths, read_json
from permed_compute.queue.port import Job
from permed_compute.states import JobState
from permed_compute.tracking.port import RunRecord

BUNDLE = "bundle"
"""The folder in which a training leaves its model."""
_NOT_SENT = ("parts",)  # part folders can be large and personal: they stay in the results, tracking gets the rest


def record_of(job: Job, state: JobState, paths: JobPaths, ended_at: int) -> RunRecord:
    """Everything about the job's newest attempt; complete also where it left no results."""
    manifest: Mapping[str, Any] = read_json(paths.results / "manifest.json") or {}
    result: Mapping[str, Any] = read_json(paths.results / "result.json") or {}
    if manifest.get("job", {}).get("attempt") != job.attempt:
        manifest, result = {}, {}  # of an earlier attempt
    at = int(manifest.get("ended_at", ended_at))
    metrics = {name: [(0, float(value), at)] for name, value in result.get("metrics", {}).items()}
    for name, points in result.get("series", {}).items():
        metrics[name] = [(int(step), float(value), int(when)) for step, value, when in points]
    for name, seconds in manifest.get("stages", {}).items():
        metrics[f"stage_s/{name}"] = [(0, float(seconds), at)]
    for name, value in manifest.get("usage", {}).items():
        metrics[f"usage/{name}"] = [(0, float(value), at)]
    return RunRecord(
        job_id=job.id, name=job.spec.name, experiment=f"{job.spec.account}/{job.spec.workload}", state=state.value,
        started_at=job.started_at or job.submitted_at, ended_at=ended_at,
        params=_params(job, manifest), metrics=metrics, tags=_tags(job, manifest),
        artifacts=tuple(str(path) for path in sorted(paths.results.glob("*")) if path.name not in _NOT_SENT)
        if manifest else (),
        models=_models(job, paths, result) if manifest and state is JobState.SUCCEEDED else (),
    )  # fmt: skip


def _models(job: Job, paths: JobPaths, result: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The bundle that a training left, if it says its digest. Accounts do not share a registered model."""
    folder, values = paths.results / BUNDLE, result.get("values", {})
    metadata = read_json(folder / "configs" / "metadata.json")
    if metadata is None or not values.get("bundle_digest"):
        return ()
    card = folder / "docs" / "README.md"
    tags = {
        "permed.digest": str(values["bundle_digest"]), "permed.job": job.id, "permed.account": job.spec.account,
        "permed.figures": str(values.get("kind", "")), "permed.legal_entity": job.spec.legal_entity,
        "permed.data_class": job.spec.data_class.value, "permed.task": str(metadata.get("task", "")),
    }  # fmt: skip
    return (
        {
            "name": f"{job.spec.account}/{metadata.get('name') or job.spec.name}".replace("/", "."),
            "folder": BUNDLE, "digest": str(values["bundle_digest"]), "tags": tags,
            "card": card.read_text(encoding="utf-8") if card.is_file() else "",
        },
    )  # fmt: skip


def _params(job: Job, manifest: Mapping[str, Any]) -> dict[str, Any]:
    spec = job.spec
    flat = {f"params.{name}": value for name, value in spec.params.items()}
    workload = manifest.get("workload", {})
    return flat | {
        "workload": spec.workload, "workload_version": workload.get("version", ""),
        "model_digest": workload.get("model_digest", ""), "spec_digest": spec.digest(), "seed": spec.seed,
        "workers": len(manifest.get("devices", ())), "cpus": spec.resources.cpus, "gpus": spec.resources.gpus,
        "memory_mib": spec.resources.memory, "inputs": len(spec.inputs),
    }  # fmt: skip


def _tags(job: Job, manifest: Mapping[str, Any]) -> dict[str, str]:
    spec = job.spec
    devices = sorted({device["flavor"] for device in manifest.get("devices", ())})
    tags = {
        "permed.attempt": str(job.attempt), "permed.account": spec.account, "permed.band": spec.band.value,
        "permed.purpose": spec.purpose.value, "permed.data_class": spec.data_class.value,
        "permed.device": ", ".join(devices), "permed.why": str(manifest.get("why", "")),
        "permed.policy": str(manifest.get("policy", "")), "permed.code": str(manifest.get("code", {})),
    }  # fmt: skip
    if job.array_id:
        tags["permed.array"] = f"{job.array_id}[{job.array_index}]"
    return tags
