"""Which model a job would use: its digest as the workload itself takes it, looked at before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from permed_compute.errors import ModelRefusedError, PermedError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.storage.digests import DigestCache
from permed_compute.workloads import registry
from permed_compute.workloads.port import Context, Map

WITHOUT_MODEL = frozenset({"omics/convert", "pathology/convert", "pathology/tiles", "radiology/ingest"})
"""Workloads that change the form of data and conclude nothing. Any other that does not say its model is refused."""


@dataclass(frozen=True, slots=True)
class Used:
    """digest: of the model's weights and code, '' of a workload without one. version: of the workload's output."""

    workload: str
    digest: str
    version: str
    params: Mapping[str, Any]


class _Looking:
    """As much of a context as `Map.model_digest` needs: inputs and digests."""

    def __init__(self, spec: JobSpec, digests: DigestCache) -> None:
        self.spec, self.digests = spec, digests

    def digest(self, path: Path) -> str:
        return self.digests.digest(path)

    def input(self, name: str = "input") -> Path:
        found = next((ref.path for ref in self.spec.inputs if ref.name == name), None)
        if found is None:
            raise WorkloadError(f"The job has no input {name!r}.")
        return Path(found)


def used_by(spec: JobSpec, cache: Path) -> Used:
    """The model of a single job. Raises `ModelRefusedError` where it cannot be known.

    cache: folder where digests of files are remembered.
    """
    if spec.workload in WITHOUT_MODEL and not spec.code:
        return Used(spec.workload, "", "", {})
    if spec.code or spec.workload not in registry.CATALOG:
        raise ModelRefusedError(
            "A job for care brings code of its own: what its model is cannot be known.", rule="model-unknown",
            remedy="Use a workload that ships, e.g. radiology/segment with a bundle; or write `purpose: research`.",
        )  # fmt: skip
    found = registry.find(spec)
    digests = DigestCache(cache)
    try:
        looking = cast(Context, _Looking(spec, digests))
        digest = found.workload.model_digest(spec, looking) if isinstance(found.workload, Map) else ""
    except (OSError, AttributeError, PermedError) as error:
        said = error.message if isinstance(error, PermedError) else type(error).__name__
        raise ModelRefusedError(
            f"The job's model cannot be looked at here: {said}", rule="model-unknown",
            remedy="It must lie where the controller can read it, and be what the job says.",
        ) from None  # fmt: skip
    digests.save()
    if not digest:
        raise ModelRefusedError(
            f"{spec.workload} does not say what its model is, so that none can be cleared for care.",
            rule="model-unknown", remedy="Write `purpose: research` or `quality`.",
        )  # fmt: skip
    return Used(spec.workload, digest, found.version, spec.params)
