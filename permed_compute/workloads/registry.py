"""From a workload's name in a job to its `Map` or `Gang`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.errors import WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.workloads.from_source import compile_anew
from permed_compute.workloads.port import Gang, Map, PartResult, Workload

CATALOG = {
    "fusion/predict": "permed_compute.workloads.fusion.predict:WORKLOAD",
    "fusion/train-classification": "permed_compute.workloads.fusion.train:CLASSIFICATION_WORKLOAD",
    "fusion/train-survival": "permed_compute.workloads.fusion.train:SURVIVAL_WORKLOAD",
    "omics/convert": "permed_compute.workloads.omics.convert:WORKLOAD",
    "omics/factors": "permed_compute.workloads.omics.factors:WORKLOAD",
    "omics/frequency": "permed_compute.workloads.omics.frequency:WORKLOAD",
    "omics/gwas": "permed_compute.workloads.omics.gwas:WORKLOAD",
    "omics/matrix": "permed_compute.workloads.omics.matrix:WORKLOAD",
    "omics/panel": "permed_compute.workloads.omics.panel:WORKLOAD",
    "omics/prs": "permed_compute.workloads.omics.prs:WORKLOAD",
    "omics/qc": "permed_compute.workloads.omics.qc:WORKLOAD",
    "omics/vae": "permed_compute.workloads.omics.vae:WORKLOAD",
    "pathology/convert": "permed_compute.workloads.pathology.stores:WORKLOAD",
    "pathology/encode": "permed_compute.workloads.pathology.encode:WORKLOAD",
    "pathology/predict": "permed_compute.workloads.pathology.predict:WORKLOAD",
    "pathology/segment": "permed_compute.workloads.pathology.segment:WORKLOAD",
    "pathology/tiles": "permed_compute.workloads.pathology.tiles:WORKLOAD",
    "pathology/train-mil": "permed_compute.workloads.pathology.train:WORKLOAD",
    "radiology/brain-extraction": "permed_compute.workloads.radiology.infer:WORKLOAD",
    "radiology/evaluate": "permed_compute.workloads.radiology.evaluate:WORKLOAD",
    "radiology/ingest": "permed_compute.workloads.radiology.ingest:WORKLOAD",
    "radiology/predict": "permed_compute.workloads.radiology.predict:WORKLOAD",
    "radiology/radiomics": "permed_compute.workloads.radiology.characterise:WORKLOAD",
    "radiology/segment": "permed_compute.workloads.radiology.segment:WORKLOAD",
    "radiology/sweep": "permed_compute.workloads.radiology.sweep:WORKLOAD",
    "radiology/third-party": "permed_compute.workloads.radiology.third_party:WORKLOAD",
    "radiology/train-classification": "permed_compute.workloads.radiology.classify:WORKLOAD",
    "radiology/train-segmentation": "permed_compute.workloads.radiology.train:WORKLOAD",
    "radiology/worklist": "permed_compute.workloads.radiology.worklist:WORKLOAD",
}
"""The workloads that ship, by the name that a job file gives."""

_MOST_CODE_FILES = 5000


@dataclass(frozen=True, slots=True)
class Found:
    """A workload, and the digest of the researcher's code folder ('' for what is installed)."""

    workload: Workload
    code_digest: str

    @property
    def version(self) -> str:
        """Output version: part of every key. Changed code is another version."""
        return f"{self.workload.version}+{self.code_digest[:16]}" if self.code_digest else self.workload.version


def find(spec: JobSpec) -> Found:
    """The workload that a job names. Raises `WorkloadError`, saying what was looked for and where."""
    target = CATALOG.get(spec.workload, spec.workload)
    if ":" not in target:
        names = ", ".join(sorted(CATALOG))
        raise WorkloadError(
            f"There is no workload {spec.workload!r}.", remedy=f"Ours: {names}; yours: module:function."
        )
    digest = ""
    module_name, _, attribute = target.partition(":")
    if spec.code:
        digest = _code_digest(Path(spec.code))
        _put_first(Path(spec.code), digest)
        _forget_namesake(Path(spec.code), module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = "the job's code folder or an installed package" if spec.code else "an installed package"
        raise WorkloadError(
            f"Module {module_name!r} of workload {spec.workload!r} cannot be imported: {error}.",
            remedy=f"It must be in {where}.",
        ) from error
    except SystemExit as error:
        raise WorkloadError(
            f"Module {module_name!r} of workload {spec.workload!r} ends the process that imports it.",
            remedy="Put what it does as a script under `if __name__ == '__main__':`.",
        ) from error
    value = getattr(module, attribute, None)
    if value is None:
        raise WorkloadError(f"Module {module_name!r} has no {attribute!r}.")
    return Found(_shaped(value, spec.workload), digest)


def _shaped(value: Any, name: str) -> Workload:
    if isinstance(value, Map | Gang):
        return value
    first = list(inspect.signature(value).parameters)[:2] if callable(value) else []
    if first == ["spec", "ctx"]:
        return Gang(train=value)
    if first == ["part", "ctx"]:
        return Map(run=lambda part, model, ctx: _result(value(part, ctx)))
    raise WorkloadError(
        f"{name!r} has neither of the two shapes.",
        remedy="Write train(spec, ctx) for a gang, run(part, ctx) for a map, or a module-level Map(…) or Gang(…).",
    )


def _result(value: Any) -> PartResult:
    if isinstance(value, PartResult):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise WorkloadError(
            f"The part returned a {type(value).__name__}.", remedy="Return a dict of values, a PartResult, or nothing."
        )
    return PartResult(values=value or {})


def _code_digest(folder: Path) -> str:
    if not folder.is_dir():
        raise WorkloadError("The job's code folder is not there.", remedy="`code:` names a folder with your module.")
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")
    )
    if len(files) > _MOST_CODE_FILES:
        raise WorkloadError(f"The code folder holds {len(files)} files.", remedy="Give a folder of code, without data.")
    total = hashlib.sha256()
    for path in files:
        total.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


_loaded: dict[str, str] = {}


def _put_first(folder: Path, digest: str) -> None:
    """Import from `folder`; modules of an older state of it are forgotten, so that changed code is really run."""
    place = str(folder)
    if _loaded.get(place) != digest:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(place + "/"):
                del sys.modules[name]
        importlib.invalidate_caches()
        _loaded[place] = digest
    compile_anew(folder)
    if sys.path[:1] != [place]:
        sys.path.insert(0, place)


def _forget_namesake(folder: Path, name: str) -> None:
    """Another job's module of the same name, imported earlier in this process, must not stand in for this one's."""
    if not ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
        return
    known = str(getattr(sys.modules.get(name), "__file__", None) or "")
    if known and not known.startswith(f"{folder}/"):
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
