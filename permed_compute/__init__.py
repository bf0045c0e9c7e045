"""permed_compute: a job layer for heavy work on images and omics, on clusters that hospitals and universities share.

    from permed_compute import JobSpec, submit
    job = submit("jobs/radiology/brain-extraction/job.yaml")

Names are loaded when they are used: importing this package loads neither ray, torch, mlflow nor pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permed_compute.client import Client, submit
    from permed_compute.errors import PermedError
    from permed_compute.queue.port import Job
    from permed_compute.spec import JobSpec
    from permed_compute.workloads.port import Gang, Map, Part, PartResult, Result

__version__ = "0.1.0"

_HOME_OF = {
    "Client": "client", "submit": "client", "PermedError": "errors", "Job": "queue.port", "JobSpec": "spec",
    "Gang": "workloads.port", "Map": "workloads.port", "Part": "workloads.port", "PartResult": "workloads.port",
    "Result": "workloads.port",
}  # fmt: skip

__all__ = ["Client", "Gang", "Job", "JobSpec", "Map", "Part", "PartResult", "PermedError", "Result", "submit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
