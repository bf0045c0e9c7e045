"""Where a bundle runs: in this process where its digest is allow-listed, else in a sealed one.

The sealed process (`sealed.py`) has no network, writes to one folder, and stays from study to study; what it says is
data, never trusted: labels of the image's shape, or a probability for each class.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np

from permed_compute.errors import NotFoundError, PermedError, WorkloadError
from permed_compute.workloads.port import Context
from permed_compute.workloads.radiology import precision, sealed, sliding
from permed_compute.workloads.radiology.bundle import (
    Checked,
    Options,
    Plain,
    Prepared,
    Runner,
    Segmented,
    Variant,
    allowed,
    probabilities_of,
)

LONGEST_STUDY_S = 3600


def open_bundle(bundle: Checked, options: Options, *, device: str, threads: int, scratch: Path) -> Runner:
    """In this process where the digest is allowed; else sealed, or `EngineError` where that cannot be done here."""
    if bundle.digest in allowed():
        return Plain(bundle.root, options, device=device, threads=threads, scratch=scratch)
    return Sealed(bundle, options, device=device, threads=threads, scratch=scratch)


def loaded(bundle: Checked, options: Options, ctx: Context) -> Runner:
    """For a worker, once: `open_bundle` on its device."""
    with ctx.stage("load model"):
        return open_bundle(bundle, options, device=ctx.device, threads=ctx.threads, scratch=ctx.scratch)


class Sealed:
    """The bundle in a process of its own that stays from study to study; pixels in, labels out, through one folder."""

    is_sealed = True

    def __init__(self, bundle: Checked, options: Options, *, device: str, threads: int, scratch: Path) -> None:
        above = scratch / "sealed"
        above.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = Path(tempfile.mkdtemp(dir=above))
        self._limit = LONGEST_STUDY_S
        self._threads = threads
        self._setup: dict[str, Any] = {
            "root": str(bundle.root.resolve()), "device": device, "threads": threads, "options": asdict(options)
        }  # fmt: skip
        self._start()

    def _start(self) -> None:
        answer, give = os.pipe()
        command = [
            sys.executable, "-I", "-m", sealed.__name__, str(self.folder), self._setup["root"], "--", __name__,
            str(give),
        ]  # fmt: skip
        with (self.folder / "log").open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(give,),
                env=sealed.environment(self.folder, self._threads), cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        os.close(give)
        self._answers = os.fdopen(answer, encoding="utf-8", errors="replace")
        self._ask(self._setup)

    def prepare(self, image: Path) -> Path:
        """Nothing: the sealed process does one thing at a time."""
        return image

    def segment(
        self, image: Path | Prepared, shape: Sequence[int], affine: np.ndarray, variant: Variant = Variant()
    ) -> Segmented:
        given, found = self._given(image), self.folder / "labels.npy"
        row = self._ask({
            "image": str(given), "shape": list(shape), "affine": np.asarray(affine).tolist(),
            "variant": [variant.name, variant.machine, variant.tolerance],
        })  # fmt: skip
        try:
            labels = np.load(found, allow_pickle=False)
        except (OSError, ValueError):
            raise WorkloadError("The sealed bundle left no labels.", remedy="See the bundle's own tests.") from None
        finally:
            given.unlink(missing_ok=True)
            found.unlink(missing_ok=True)
        if labels.shape != tuple(shape) or labels.dtype not in (np.uint8, np.int16):
            raise WorkloadError("The sealed bundle left something else than labels of the image's voxels.")
        windows = tuple(int(n) for n in row["windows"])[:3]
        return Segmented(labels, windows, bool(row["shrunk"]), bool(row["streamed"]), float(row["network_s"]))

    def probabilities(self, image: Path | Prepared) -> dict[str, float]:
        given = self._given(image)
        try:
            return probabilities_of(self._ask({"image": str(given)}).get("probabilities"))
        finally:
            given.unlink(missing_ok=True)

    def _given(self, image: Path | Prepared) -> Path:
        """The image where the sealed process reads it; that process again, where a study broke it."""
        assert isinstance(image, Path)
        if self._process.poll() is not None:
            self._start()
        return Path(shutil.move(image, self.folder / "image.nii"))

    def calibrate(self, tolerance: float) -> Mapping[str, Any]:
        row = self._ask({"tolerance": tolerance})
        if row.get("variant") not in precision.VARIANTS:
            raise WorkloadError("The sealed bundle chose a variant that does not exist.")
        return row

    def _ask(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One line each way. What the sealed process says is data: only its kind of error is told on, not its words."""
        watch = Timer(self._limit, self._process.kill)
        watch.daemon = True
        watch.start()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write((json.dumps(row) + "\n").encode())
            self._process.stdin.flush()
            answer = json.loads(self._answers.readline(1 << 16))
            if "error" in answer:
                raise _told(answer["error"])
            return dict(answer)
        except (OSError, ValueError, TypeError, KeyError):
            raise self._lost() from None
        finally:
            watch.cancel()

    def _lost(self) -> PermedError:
        status = self._end()
        if status == sealed.UNSEALED:
            return sealed.cannot(self.folder / "log")
        return WorkloadError(
            f"The sealed bundle ended (status {status}): it broke, or tried what it may not.",
            remedy="If it is trusted, an operator can allow its digest.",
        )

    def _end(self) -> int:
        for pipe in (self._process.stdin, self._answers):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            return self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        self._end()

    def __del__(self) -> None:
        if hasattr(self, "_answers") and self._process.poll() is None:
            self.close()


_KINDS: dict[str, type[PermedError]] = {
    "out-of-memory": sliding.OutOfMemoryError,
    "workload": WorkloadError,
    "not-found": NotFoundError,
}


def _told(error: Any) -> PermedError:
    kind = _KINDS.get(str(error.get("code")))
    text = "".join(c for c in str(error.get("message"))[:300] if c.isprintable())
    if kind is None:
        return WorkloadError(f"The sealed bundle raised {text[:60]}.", remedy="See the bundle's own tests.")
    return kind(f"In the sealed bundle: {text}")


def main(arguments: list[str]) -> int:
    """Inside the sealed process: set up from the first line of stdin, then a study per line, until it is closed."""
    folder = Path.cwd()
    with os.fdopen(int(arguments[0]), "w", encoding="utf-8") as answers:
        runner: Plain | None = None
        for line in sys.stdin:
            row = json.loads(line)
            try:
                if runner is None:
                    options = Options.of(row["options"])
                    runner = Plain(
                        Path(row["root"]), options, device=row["device"], threads=row["threads"], scratch=folder
                    )
                    answer: dict[str, Any] = {}
                elif "tolerance" in row:
                    answer = dict(runner.calibrate(row["tolerance"]))
                elif "shape" not in row:
                    answer = {"probabilities": runner.probabilities(Path(row["image"]))}
                else:
                    variant = Variant(*row["variant"])
                    done = runner.segment(Path(row["image"]), row["shape"], np.array(row["affine"]), variant)
                    np.save(folder / "labels.npy", done.labels, allow_pickle=False)
                    answer = {
                        "windows": done.windows, "shrunk": done.shrunk, "streamed": done.streamed,
                        "network_s": done.network_s,
                    }  # fmt: skip
            except PermedError as error:
                answer = {"error": {"code": error.code, "message": str(error)}}
            except Exception as error:  # noqa: BLE001 - the bundle's code raises whatever it likes
                answer = {"error": {"code": "code", "message": type(error).__name__}}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    return 0
