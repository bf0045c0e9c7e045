"""`--via ssh:HOST`: submit, look and fetch on another machine over the user's own ssh, with files carried both ways."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permed_compute.cli import words
from permed_compute.errors import NotFoundError, SettingsError
from permed_compute.paths import read_json, write_json

if TYPE_CHECKING:
    from permed_compute.cli.session import Session
    from permed_compute.spec import JobSpec
    from permed_compute.transfer.remote import Remote

CARRIES = ("submit", "results")
"""Commands that bring files along; they look at `session.via` themselves."""
FORWARDED = (
    "status", "why", "jobs", "logs", "cancel", "hold", "release", "resume", "top", "doctor", "catalog", "site",
)  # fmt: skip
"""Commands that run there as they are typed here."""


def forward(session: Session, rest: Sequence[str]) -> int:
    """Run the command there. Raises `SettingsError` for one that would mean this machine's files."""
    if rest[0] not in FORWARDED:
        raise SettingsError(
            f"`permed {rest[0]}` does not go through --via.", remedy=f"These do: {', '.join((*CARRIES, *FORWARDED))}."
        )
    return remote(session).forward([*(["--json"] if session.as_json else []), *rest])


def remote(session: Session) -> Remote:
    from permed_compute.storage.digests import DigestCache
    from permed_compute.transfer.remote import Remote

    given = [
        word for name in ("site", "preset", "executor") if (value := session.flags.get(name))
        for word in (f"--{name}", str(value))
    ]  # fmt: skip
    return Remote.of(session.via, given, DigestCache(session.settings.paths.create().cache))


def submit(session: Session, specs: Sequence[JobSpec], *, held: bool) -> None:
    """Carry inputs and code there, then queue the jobs once, however often the line is cut and this is typed again."""
    there = remote(session)
    moved = [_moved(session, there, spec) for spec in specs]
    texts = [spec.canonical() for spec in moved]
    at_site = {name: value for name, value in session.flags.items() if name.startswith("site_")}
    what = hashlib.sha256(json.dumps([session.via, *there.options, at_site, *texts]).encode()).hexdigest()
    intent = session.settings.paths.submissions / f"{what}.json"
    token = (read_json(intent) or {}).get("token") or secrets.token_hex(16)
    write_json(intent, {"token": token})
    rows = there.ask("submit", say={"token": token, "specs": texts, "held": held, "site": at_site})
    intent.unlink(missing_ok=True)

    def show(console: Any) -> None:
        for row in rows[:20]:
            console.print(f"{row['id']}  {row['state']}", markup=False)

    session.answer(rows, show)
    session.note(f"Look: permed --via {session.via} why {rows[0]['id']}")


def _moved(session: Session, there: Remote, spec: JobSpec) -> JobSpec:
    """The spec with its inputs and code as they stand there; sets are received there, and named as they are."""
    from permed_compute.cli.transfer import bar

    refs = [ref for ref in spec.inputs if not ref.transfer]
    here = [Path(text) for text in (*(ref.path for ref in refs), *([spec.code] if spec.code else []))]
    if not all(path.exists() for path in here):
        raise NotFoundError(
            "An input of the job is not on this machine.",
            remedy="--via carries what is here; for data that are there, submit there.",
        )
    with bar(session, "carrying") as progress:
        moved = there.carry(here, spec.data_class, progress) if here else []
    there_are = iter(moved)
    inputs = tuple(ref if ref.transfer else ref.model_copy(update={"path": next(there_are)}) for ref in spec.inputs)
    return spec.model_copy(update={"inputs": inputs, "code": moved[-1] if spec.code else ""})


def results(session: Session, job: str, to: Path | None) -> None:
    """Fetch a job's results."""
    from permed_compute.cli.transfer import bar

    if to is None:
        raise SettingsError("Results come through --via into a folder.", remedy="Add --to FOLDER.")
    with bar(session, "fetching") as progress:
        receipt = remote(session).fetch(job, to, session.settings.paths.transfers, progress)
    session.answer(
        receipt.as_dict(),
        lambda console: console.print(
            f"{receipt.files} files, {words.size(receipt.bytes)} in {receipt.folder}", markup=False
        ),
    )
