"""`permed far`: what `permed --via ssh:HOST` asks the `permed` of the other side for. Not for people."""

from __future__ import annotations

import fcntl
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session
from permed_compute.errors import NotFoundError, StateError

if TYPE_CHECKING:
    from permed_compute.paths import HomePaths
    from permed_compute.queue.port import Job
    from permed_compute.service import Service
    from permed_compute.spec import JobSpec

app = typer.Typer(help="For `permed --via`, not for people.", hidden=True)

_REFERENCE = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[0-9a-f]{32}")
ReferenceArgument = Annotated[str, typer.Argument(help="Of a set of files.")]


@app.command("land")
def land(ctx: typer.Context, references: Annotated[list[str], typer.Argument(help="Of sets of files.")]) -> None:
    """Unpack sets that have come in, unless they are in place; a folder is '' where the set has not come in whole.

    Example: permed far land 0123…
    """
    session = Session.of(ctx)
    paths = session.settings.paths.create()
    paths.incoming.mkdir(mode=0o700, exist_ok=True)
    paths.received.mkdir(mode=0o700, exist_ok=True)
    folders = {reference: _landed(paths, _matching(_REFERENCE, reference)) for reference in references}
    session.answer({"folders": folders, "incoming": str(paths.incoming)})


def _landed(paths: HomePaths, reference: str) -> str:
    from permed_compute.transfer import receipts, sets
    from permed_compute.transfer.bundle import arrived
    from permed_compute.transfer.folder import Folder

    receipt = receipts.receipt(paths.transfers, reference)
    if receipt is not None:
        return receipt.folder
    with Folder(paths.incoming) as channel:
        try:
            found = arrived(channel, reference)
        except NotFoundError:
            return ""
        receipt = sets.receive(
            found, paths.received / reference[:16], verify=lambda text, signature: "", receipts=paths.transfers,
            progress=lambda done, total: None,
        )  # fmt: skip
        for name in found.names:
            channel.forget(name)
    return receipt.folder


@app.command("submit")
def submit(ctx: typer.Context) -> None:
    """Queue the jobs of stdin's `{token, specs, held, site}`, once for each token.

    Example: permed far submit < asked.json
    """
    from permed_compute.paths import read_json, write_json
    from permed_compute.spec import from_json

    session = Session.of(ctx)
    asked = json.load(sys.stdin)
    specs = [from_json(text) for text in asked["specs"]]
    session.flags = {**session.flags, **{k: v for k, v in asked["site"].items() if k.startswith("site_")}}
    record = session.settings.paths.create().submissions / f"{_matching(_TOKEN, asked['token'])}.json"
    with _alone(record.with_suffix(".lock")), session.client() as client:
        known = read_json(record)
        if known is None:
            write_json(record, known := {"begun": int(time.time() * 1000), "jobs": []})
            jobs = client.service.submit(specs, held=bool(asked["held"]))
        else:
            # The line or this machine broke after the first call: what it queued is found by what it is.
            jobs = [client.service.job(job) for job in known["jobs"]] or _queued(client.service, specs, known["begun"])
            jobs = jobs or client.service.submit(specs, held=bool(asked["held"]))
        write_json(record, known | {"jobs": [job.id for job in jobs]})
        session.answer([words.job_row(job) for job in jobs])


def _queued(service: Service, specs: list[JobSpec], since: int) -> list[Job]:
    digests = {element.digest() for spec in specs for element in [spec, *map(spec.element, range(len(spec.array)))]}
    return [job for job in service.jobs() if job.submitted_at >= since and job.spec.digest() in digests]


@app.command("pack")
def pack(ctx: typer.Context, job: Annotated[str, typer.Argument(help="Job id.")]) -> None:
    """Make a set of a job's results, to be fetched.

    Example: permed far pack 01k9
    """
    from permed_compute.storage.digests import DigestCache
    from permed_compute.transfer import sets
    from permed_compute.transfer.bundle import Bundle, Layout
    from permed_compute.transfer.folder import Folder

    session = Session.of(ctx)
    paths = session.settings.paths.create()
    with session.client() as client:
        found = client.service.job(job)
    results = paths.job(found.id).results
    if not results.is_dir():
        raise NotFoundError(f"Job {found.id} has no results: it is {found.state}.", remedy=f"permed why {found.id}")
    digests = DigestCache(paths.cache)
    manifest = sets.manifest_of(results, found.spec.data_class, digests.digest, lambda done, total: None)
    digests.save()
    paths.outgoing.mkdir(mode=0o700, exist_ok=True)
    with Folder(paths.outgoing) as channel:
        sets.send(channel, Bundle(results, Layout(manifest, b"")), progress=lambda *_: None)
    session.answer({"reference": manifest.reference, "outgoing": str(paths.outgoing)})


@app.command("drop")
def drop(ctx: typer.Context, reference: ReferenceArgument) -> None:
    """Remove a set that was fetched.

    Example: permed far drop 0123…
    """
    session = Session.of(ctx)
    stem = f"permed-{_matching(_REFERENCE, reference)[:16]}"
    for path in session.settings.paths.outgoing.glob(f"*{stem}*"):
        path.unlink(missing_ok=True)
    session.answer({})


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise StateError("This is not what `permed --via` sends.", remedy="Is the same version on both sides?")
    return text


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """A second call of the same token waits for the first, which a cut line does not end."""
    lock.parent.mkdir(mode=0o700, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
