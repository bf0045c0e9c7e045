"""Job `radiology/third-party`: somebody else's segmentation model over cases, sealed, to be evaluated beside ours.

`inputs`: `cases`, the list of `radiology/evaluate` whose cases have an `image`, and `model`, a folder with the model
and what it needs. Each case runs in a process of its own that sees pixels and an affine, reaches no network and writes
to one empty folder only (`sealed.py`); where the machine cannot hold it to that, nothing runs.

`params` of the job:
    name       theirs   what its predictions are called in the list
    entry      ''       `module:function` in the folder, called as function(image: Path, labels: Path)
    command    []       or a program of the folder with its arguments; {image} and {labels} stand for the paths
    limit      30m      a case that takes longer is ended
    attempts   stop     what becomes of a case whose model tries the network or a file elsewhere: stop, or note (the
                        attempt is refused all the same, and the model goes on)

It writes `labels`, a NIfTI (.nii) of whole numbers from 0 to 255 on the image's grid. Results: a NIfTI per case, and
`cases.json`, the list with these predictions added, for `radiology/evaluate`. A case without labels is in it without a
prediction, which counts as one that missed everything.

What is reported of attempts: Python's own (an audit hook). What native code tries is refused by the kernel in silence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec, parse_duration
from permed_compute.workloads.from_source import compile_anew
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import sealed

if TYPE_CHECKING:
    from permed_compute.workloads.radiology.read import Volume

CASES, MODEL = "cases", "model"
IMAGE, LABELS, PUBLISHED = "image.nii", "labels.nii", "labels.nii.gz"
STOPPED = 96
"""Exit status of a sealed process that ended itself because its model tried what it may not."""
VERSION = "1"
_MOST_REPORT, _MOST_TOLD = 1 << 16, 100
_PARAMS: dict[str, Any] = {"name": "theirs", "entry": "", "command": [], "limit": "30m", "attempts": "stop"}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [Problem(f"params.{name}", f"is none of {list(_PARAMS)}.") for name in given if name not in _PARAMS]
    values = {**_PARAMS, **given}
    module, colon, function = str(values["entry"]).partition(":")
    words = values["command"]
    checks = {
        "name": isinstance(values["name"], str) and bool(values["name"]),
        "entry": not values["entry"] or bool(module and colon and function),
        "command": isinstance(words, list) and all(isinstance(word, str) for word in words),
        "limit": _is_duration(values["limit"]),
        "attempts": values["attempts"] in ("stop", "note"),
    }
    problems += [Problem(f"params.{name}", f"cannot be {values[name]!r}.") for name, good in checks.items() if not good]
    if bool(values["entry"]) == bool(words):
        problems.append(Problem("params.entry", "write either `entry` or `command`."))
    if problems:
        raise SpecError("params", problems)
    return values


def _is_duration(value: Any) -> bool:
    try:
        return parse_duration(value) > 0
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part per case. Raises `EngineError` where this machine cannot seal, `WorkloadError` for an unusable list."""
    run_sealed(Path(tempfile.mkdtemp(dir=ctx.scratch)), ctx.input(MODEL).resolve(), {"probe": True}, 60, ctx.threads)
    return _parts(spec, ctx)


def _parts(spec: JobSpec, ctx: Context) -> list[Part]:
    params, folder = params_of(spec.params), ctx.input(CASES).parent
    model = ctx.input(MODEL).resolve()
    parts: list[Part] = []
    seen: Counter[str] = Counter()
    for row in _rows(ctx):
        image = folder / row["image"]
        digest = ctx.digest(image)
        seen[digest] += 1
        name = f"case-{digest[:16]}" + (f"-{seen[digest]}" if seen[digest] > 1 else "")
        sources = (str(image), str(model))
        parts.append(Part(name, (digest,), params, sources, ctx.pseudonym(str(row["subject"]))))
    return parts


def _rows(ctx: Context) -> list[dict[str, Any]]:
    try:
        rows = [dict(row) for row in json.loads(ctx.input(CASES).read_text(encoding="utf-8"))["cases"]]
        complete = all(row["image"] and row["subject"] and row["label"] for row in rows) and bool(rows)
    except (OSError, ValueError, KeyError, TypeError):
        rows, complete = [], False
    if not complete:
        raise WorkloadError("The list of cases cannot be used.", remedy="Each case has `label`, `image` and `subject`.")
    return rows


def model_digest(spec: JobSpec, ctx: Context) -> str:
    """Of every file of the model's folder."""
    from permed_compute.workloads.radiology.bundle import folder_digest

    return folder_digest(ctx.input(MODEL), ctx.digest)


# ------------------------------------------------------------------------------------------------ one case


@dataclass(frozen=True, slots=True)
class Case:
    part: Part
    image: Volume
    folder: Path
    """The one that the model may write to."""


def load(part: Part, ctx: Context) -> Case:
    """The image with nothing but pixels and affine. Raises `RefusedInput`."""
    from permed_compute.workloads.radiology import nifti

    with ctx.stage("read"):
        image = nifti.read(Path(part.sources[0]), part.inputs[0])[0]
        folder = Path(tempfile.mkdtemp(dir=ctx.scratch))
        nifti.write(image.array, image.affine_ras, folder / IMAGE)
    return Case(part, image, folder)


def run(case: Case, model: None, ctx: Context) -> PartResult:
    """Its labels as NIfTI, or what it tried. Raises `WorkloadError` where it broke or left something else."""
    try:
        return _predicted(case, ctx)
    finally:
        shutil.rmtree(case.folder, ignore_errors=True)


def _predicted(case: Case, ctx: Context) -> PartResult:
    from permed_compute.workloads.radiology import nifti

    params = case.part.params
    call = {name: params[name] for name in ("entry", "command", "attempts")}
    with ctx.stage("third party"):
        limit = parse_duration(params["limit"])
        ended = run_sealed(case.folder, Path(case.part.sources[1]), call, limit, ctx.threads)
    counted = Counter(kind for kind, _ in ended.attempts)
    findings = [_finding(kind, count, ended, case.part.name) for kind, count in sorted(counted.items())]
    values = {"attempts": dict(counted), "stopped": ended.status == STOPPED, "labels": False}
    if ended.status == STOPPED:
        return PartResult(values, findings)
    if ended.status:
        said = "took longer than its limit" if ended.status == -signal.SIGKILL else f"ended with status {ended.status}"
        raise WorkloadError(f"The model {said}.", remedy="Its own tests must show why; what it printed is not kept.")
    nifti.write(_labels(case), case.image.affine_ras, ctx.out / PUBLISHED)
    return PartResult(values | {"labels": True}, findings)


def _finding(kind: str, count: int, ended: Ended, about: str) -> Finding:
    what = {"network": "the network", "write": "a file outside its folder"}[kind]
    then = "it was stopped there" if ended.status == STOPPED else "it was refused and went on"
    events = sorted({event for each, event in ended.attempts if each == kind})
    sentence = f"The model tried {what} ({', '.join(events)}); {then}."
    return Finding(f"TRIED_{kind.upper()}", sentence, "note", about, {"times": count})


def _labels(case: Case) -> Any:
    """What it left, as uint8. It is a stranger's file: no link is followed, and its header must be the image's."""
    import numpy as np

    from permed_compute.workloads.radiology import nifti, patches

    path = case.folder / LABELS
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        regular = False
    if not regular:
        raise WorkloadError(f"The model left no {LABELS}.", remedy="It writes the path that it is given.")
    try:
        if nifti.shape_of(path, "labels") != case.image.array.shape:
            raise WorkloadError("The model's labels have another shape than the image.", remedy="One label per voxel.")
        found = nifti.read(path, "labels")[0]
    except RefusedInput as error:
        raise WorkloadError(f"The model's labels cannot be read ({error.finding.code}).") from None
    if np.abs(found.affine_ras - case.image.affine_ras).max() > patches.SAME_PLACE:
        raise WorkloadError("The model's labels lie on another grid than the image.", remedy="Keep the image's affine.")
    labels = found.array.astype(np.uint8)
    if not np.array_equal(labels, found.array):
        raise WorkloadError("The model's labels are not whole numbers from 0 to 255.", remedy="Write uint8.")
    return labels


# ------------------------------------------------------------------------------------------------ outside


@dataclass(frozen=True, slots=True)
class Ended:
    """attempts: (`network` or `write`, the event's name), as far as Python knows them."""

    status: int
    attempts: Sequence[tuple[str, str]]


def run_sealed(folder: Path, model: Path, call: Mapping[str, Any], limit: float, threads: int) -> Ended:
    """Run one call in a process sealed to `folder`. Raises `EngineError` where it cannot be sealed here."""
    answer, give = os.pipe()
    command = [
        sys.executable, "-I", "-m", sealed.__name__, str(folder), str(model), "--", __name__, str(give), str(model),
        json.dumps(dict(call)),
    ]  # fmt: skip
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(give,),
            env=sealed.environment(folder, threads), cwd=folder, start_new_session=True,
        )  # fmt: skip
    os.close(give)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = -signal.SIGKILL
    _end_group(process)
    with os.fdopen(answer, "rb") as told:
        os.set_blocking(told.fileno(), False)
        lines = (told.read(_MOST_REPORT) or b"").decode("utf-8", "replace").splitlines()
    if status == sealed.UNSEALED:
        raise sealed.cannot(log)
    log.unlink(missing_ok=True)
    return Ended(status, [pair for line in lines if (pair := _pair(line)) is not None])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever it started goes with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pair(line: str) -> tuple[str, str] | None:
    """A stranger can write to the pipe, too: only known words are taken from it."""
    kind, _, event = line.partition(" ")
    known = {"network": _NETWORK, "write": _WRITES}.get(kind, frozenset())
    return (kind, event) if event in known else None


# ------------------------------------------------------------------------------------------------ inside


_NETWORK = frozenset({
    "socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.gethostbyaddr", "socket.sendto", "socket.sendmsg",
})  # fmt: skip
_WRITES = frozenset({
    "open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "os.chown",
})  # fmt: skip
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(arguments: list[str]) -> int:
    """Inside the sealed process: (file descriptor of the report, the model's folder, the call as JSON)."""
    sys.dont_write_bytecode = True
    give, model, call = int(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    if call.get("probe"):
        return 0
    folder = Path.cwd()
    compile_anew(model)
    image, labels = folder / IMAGE, folder / LABELS
    if call["command"]:
        names = {"{image}": str(image), "{labels}": str(labels)}
        program, *words = [names.get(word, word) for word in call["command"]]
        return subprocess.run([str(model / program), *words], check=False).returncode
    sys.path.insert(0, str(model))
    module, _, function = call["entry"].partition(":")
    with os.fdopen(give, "w", encoding="utf-8") as report:
        sys.addaudithook(_hook(report, folder, model, stop=call["attempts"] == "stop"))
        getattr(import_module(module), function)(image, labels)
    return 0


def _hook(report: TextIO, folder: Path, model: Path, *, stop: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """Tells of what the model tries; the kernel refuses it, whatever the model does to this hook."""
    below = f"{os.path.realpath(folder)}/"
    told: Counter[str] = Counter()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        kind = "network" if event in _NETWORK else "write" if event in _WRITES else ""
        if not kind or (kind == "write" and not _is_elsewhere(event, args, below)):
            return
        if event == "socket.__new__" and _is_imported(f"{os.path.realpath(model)}/"):
            return
        told[event] += 1
        if told[event] <= _MOST_TOLD:  # the pipe must never be full
            report.write(f"{kind} {event}\n")
            report.flush()
        if stop:
            os._exit(STOPPED)

    return hook


def _is_imported(model: str) -> bool:
    """A library outside the model's folder looks, while it is imported, whether there are sockets (urllib3 does): it is
    refused one like everybody, and means no harm."""
    frame = sys._getframe(2)
    while frame is not None:
        place = frame.f_code.co_filename
        if place.startswith(model):
            return False
        if place.startswith("<frozen importlib"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_elsewhere(event: str, args: tuple[Any, ...], below: str) -> bool:
    if event == "open" and not (isinstance(args[2], int) and args[2] & _TO_WRITE):
        return False
    places = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
    for place in places:
        if isinstance(place, int):
            continue  # a file that is open already
        real = os.path.realpath(os.fsdecode(place))
        if not f"{real}/".startswith(below) and real != os.devnull:
            return True
    return False


# ------------------------------------------------------------------------------------------------ all of them


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """The list with the predictions that there are, and what was tried."""
    params, given = params_of(ctx.spec.params), ctx.input(CASES)
    listed = json.loads(given.read_text(encoding="utf-8"))
    done = {item.part.name: item for item in results}
    rows = []
    for part, row in zip(_parts(ctx.spec, ctx), _rows(ctx), strict=True):
        found = {model: str((given.parent / path).resolve()) for model, path in (row.get("predictions") or {}).items()}
        if part.name in done and done[part.name].values["labels"]:
            found[params["name"]] = f"parts/{part.name}/{PUBLISHED}"
        else:
            found[params["name"]] = f"parts/{part.name}/none"  # listed, not there: it missed everything
        rows.append({**row, **_absolute(row, given.parent), "predictions": found})
    write_json(ctx.out / "cases.json", {**listed, "cases": rows})
    stopped = sorted(name for name, item in done.items() if item.values["stopped"])
    tried: Counter[str] = Counter()
    for item in results:
        tried.update(item.values["attempts"])
    without = [name for name in (row.part.name for row in results) if not done[name].values["labels"]]
    values = {"cases": len(rows), "without_labels": len(rows) - len(done) + len(without), "stopped": stopped,
              "attempts": dict(tried)}  # fmt: skip
    return Result(values, {"stopped": float(len(stopped)), **{f"tried_{kind}": float(n) for kind, n in tried.items()}})


def _absolute(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {name: str((folder / row[name]).resolve()) for name in ("label", "image")}
    if row.get("probability"):
        made["probability"] = {model: str((folder / path).resolve()) for model, path in row["probability"].items()}
    return made


WORKLOAD = Map(plan=plan, load=load, run=run, reduce=reduce, model_digest=model_digest, version=VERSION)
