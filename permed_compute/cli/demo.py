"""`permed demo`: the main job on a real head, from a DICOM folder to a DICOM SEG, and where everything is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from permed_compute.cli import jobfile
from permed_compute.cli.exits import Exit
from permed_compute.cli.outputs import outputs
from permed_compute.cli.run import Done, summary, work_off
from permed_compute.cli.session import Session

if TYPE_CHECKING:
    from permed_compute.paths import HomePaths

JOB = "radiology/brain-extraction"
_REAL = Path("shared", "data", "radiology", "t1-head-mr")
_TRACKING_WAIT_S = 60.0


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(ctx: typer.Context) -> None:
    """Run the main job on a real head MRI and show what comes out: DICOM SEG, NIfTI, MLflow run, manifest, page.

    Example: permed demo --home /tmp/permed-demo
    """
    session = Session.of(ctx)
    home = session.settings.paths.create()
    head = find_head(home)
    session.note(f"input   {head.folder}\n        {head.source}")
    spec = jobfile.load(JOB, inputs=[str(head.folder)])
    done = work_off(session, lambda client: client.submit(spec))
    if done.code is not Exit.OK:
        session.answer(done.as_dict(home), lambda console: summary(console, session, done))
        raise typer.Exit(done.code)
    job = done.jobs[0]
    found = five_outputs(home, job.id, done, session.settings.tracking_uri)
    missing = [name for name, where in found.items() if not where]
    value = done.as_dict(home) | {
        "input": str(head.folder),
        "source": head.source,
        "outputs": found,
        "missing": missing,
    }

    def show(console: Any) -> None:
        from rich.markup import escape

        summary(console, session, done)
        console.print()
        for name, where in found.items():
            console.print(f"[green]✓[/] {name:<12} {escape(where)}" if where else f"[red]✗[/] {name:<12} missing")
        flag = "" if home.root == Path.home() / ".permed" else f" --home {home.root}"
        console.print("\nnext:")
        for command, why in (
            (f"permed results {job.id} --open{flag}", "the page, with the overlay and the volumes"),
            (f"permed run {JOB} --input YOUR_DICOM_FOLDER{flag}", "the same on your own series"),
            (f"permed status {job.id}{flag}", "parts, history, and what it ran on"),
        ):
            console.print(f"  [cyan]{escape(command)}[/]\n      {why}")

    session.answer(value, show)
    if missing:
        raise typer.Exit(Exit.FAILED)


@dataclass(frozen=True, slots=True)
class Head:
    """The demo's input, and a sentence on where it comes from."""

    folder: Path
    source: str


def find_head(home: HomePaths) -> Head:
    """The real T1 head beside the checkout or the present folder; else one from an installed package, as DICOM."""
    here = (Path.cwd(), Path.cwd().parent, Path(__file__).resolve().parents[3])
    for place in here:
        if (place / _REAL).is_dir():
            return Head(
                (place / _REAL).resolve(),
                "a real T1 head MRI (de-faced, 0.667 mm, PDDL; datalad/example-dicom-structural)",
            )
    from permed_compute.workloads.radiology.sample import write_sample

    folder = home.root / "demo" / "head"
    made = write_sample(folder)
    stripped = "; it is already skull-stripped, so the mask is no feat" if made.skull_stripped else ""
    return Head(folder, f"{made.source}, written as a DICOM MR series{stripped}")


def five_outputs(home: HomePaths, job_id: str, done: Done, tracking_uri: str) -> dict[str, str]:
    """Where each of the five is, '' for what is not there."""
    folder = home.job(job_id).results
    files = outputs(folder)

    def first(kind: str) -> str:
        return next((str(file.path) for file in files if file.kind == kind), "")

    run = _run(home, job_id, done, tracking_uri)
    return {
        "DICOM SEG": first("dicom-seg"), "NIfTI mask": first("nifti"), "MLflow run": run,
        "manifest": first("manifest"), "HTML page": first("page"),
    }  # fmt: skip


def _run(home: HomePaths, job_id: str, done: Done, tracking_uri: str) -> str:
    if done.tracking is not None:
        return done.tracking.found_at[-1] if done.tracking.found_at else ""
    # A controller leads this home and sends by itself: the spool is empty once it has.
    from permed_compute.tracking.files import Spool

    end = time.monotonic() + _TRACKING_WAIT_S
    while time.monotonic() < end:
        if not any(job_id in entry.name for entry in Spool(home.spool).pending()):
            return f"{tracking_uri or home.mlflow / 'mlflow.db'} (tag permed.job = {job_id})"
        time.sleep(0.5)
    return ""
