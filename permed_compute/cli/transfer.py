"""`permed send` and `permed receive`: sets of files in and out, gone on from after any cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session

if TYPE_CHECKING:
    from permed_compute.paths import HomePaths
    from permed_compute.queue.port import Job
    from permed_compute.spec import DataClass
    from permed_compute.transfer.destinations import Destination, Direction
    from permed_compute.transfer.port import Progress
    from permed_compute.transfer.sets import Verify

DestinationsOption = Annotated[
    Path | None, typer.Option(help="Destinations file; default PERMED_HOME/destinations.yaml.")
]


def add_to(app: typer.Typer) -> None:
    app.command("send")(send)
    app.command("receive")(receive)


def send(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(help="A file or folder.")],
    destination: Annotated[str, typer.Argument(help="A name in the destinations file, or a folder.")],
    key: Annotated[Path | None, typer.Option(help="OpenSSH Ed25519 key to sign the manifest with.")] = None,
    data_class: Annotated[
        str, typer.Option(metavar="CLASS", help="How sensitive the files are: green, yellow, red or black.")
    ] = "red",
    volume: Annotated[
        str, typer.Option(help="Largest file to make, e.g. 2GiB; default: what the destination says.")
    ] = "",
    anew: Annotated[bool, typer.Option("--anew", help="Send it all again, over what is there.")] = False,
    destinations: DestinationsOption = None,
) -> None:
    """Send files as one set: a bundle with a manifest of digests, signed. The same command again goes on after a cut.

    Example: permed send scans gate --key ~/.ssh/id_ed25519
    """
    from permed_compute.storage.digests import DigestCache
    from permed_compute.transfer import sets, signing
    from permed_compute.transfer.bundle import Bundle, Layout
    from permed_compute.transfer.channels import channel

    session, sensitive = Session.of(ctx), _class(data_class)
    entry = _destination(session, destination, destinations, "send", sensitive)
    largest = _bytes(volume) or entry.volume
    if entry.signed and key is None:
        raise typer.BadParameter(f"{destination} takes signed sets only: --key ~/.ssh/id_ed25519")
    digests = DigestCache(session.settings.paths.cache)
    with bar(session, "reading") as progress:
        manifest = sets.manifest_of(source, sensitive, digests.digest, progress)
    digests.save()
    bundle = Bundle(source, Layout(manifest, signing.sign(manifest.text, key) if key else b""))
    with channel(entry, session.settings.paths.outgoing) as there, bar(session, "sending") as progress:
        volumes = sets.send(there, bundle, largest=largest, anew=anew, progress=progress)

    def show(console: Any) -> None:
        console.print(
            f"[green]✓[/] sent set {manifest.reference[:16]}: {_count(len(manifest.rows), 'file')},"
            f" {words.size(manifest.size)} in {_count(len(volumes), 'volume')}, {'signed' if key else 'not signed'}"
        )

    session.answer(
        {"reference": manifest.reference, "files": len(manifest.rows), "bytes": manifest.size, "volumes": volumes,
         "bundle_bytes": bundle.layout.size, "data_class": sensitive.value, "signed": key is not None},
        show,
    )  # fmt: skip


def receive(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(help="A name in the destinations file, a folder, or a bundle in one.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="New folder for the files; default below PERMED_HOME/received.")
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="What jobs call the set: an input `transfer:NAME` waits for it.")
    ] = "",
    reference: Annotated[str, typer.Option(help="Which set, where several lie there; its beginning will do.")] = "",
    signers: Annotated[
        Path | None, typer.Option(help="OpenSSH allowed_signers; default PERMED_HOME/allowed_signers.")
    ] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Accept it from whoever sent it; digests are checked all the same.")
    ] = False,
    destinations: DestinationsOption = None,
) -> None:
    """Receive a set: the signature is verified first, then every file's digest, then the folder gets its name.

    The same command again goes on after a cut. Jobs that wait for the set are queued.

    Example: permed receive kista-out --name cohort-7
    """
    from permed_compute.errors import PermissionDeniedError
    from permed_compute.transfer import receipts, sets
    from permed_compute.transfer.bundle import arrived, front
    from permed_compute.transfer.channels import channel
    from permed_compute.transfer.destinations import permit

    session = Session.of(ctx)
    paths = session.settings.paths
    if name:
        receipts.require_free(paths.transfers, name)
    file = Path(source)
    if file.is_file():
        source, reference = str(file.parent), reference or file.name.removeprefix("permed-")[:16]
    entry = _destination(session, source, destinations, "receive")
    if unsigned and entry.signed:
        raise PermissionDeniedError(f"{source} is for signed sets only.", remedy="Leave --unsigned out.")
    with channel(entry, paths.outgoing) as there, bar(session, "receiving") as progress:
        found = arrived(there, reference)
        manifest = front(found)[0]
        permit(source, entry, "receive", manifest.data_class)
        receipt = sets.receive(
            found, to or _kept(paths, manifest.reference), verify=_verifier(signers or paths.signers, unsigned),
            receipts=paths.transfers, progress=progress,
        )  # fmt: skip
        if name:
            receipts.give_name(paths.transfers, name, receipt.reference)
    queued = _let_go(session)

    def show(console: Any) -> None:
        by = f"signed by {receipt.signer}" if receipt.signer else "not signed"
        console.print(
            f"[green]✓[/] received set {receipt.reference[:16]}: {_count(receipt.files, 'file')},"
            f" {words.size(receipt.bytes)}, every byte as it was sent; {by}",
            markup=True,
        )
        if to is None:
            console.print(f"  in {receipt.folder}", markup=False)
        for job in queued:
            console.print(f"  {job.id}  {job.spec.name} waited for it, and is queued", markup=False)

    session.answer(receipt.as_dict() | {"name": name, "queued": [job.id for job in queued]}, show)


def _kept(paths: HomePaths, reference: str) -> Path:
    """Where a set stands that nobody gave a place: as those of `--via`."""
    from permed_compute.transfer import receipts

    paths.received.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = receipts.receipt(paths.transfers, reference)
    return Path(before.folder) if before else paths.received / reference[:16]


def _let_go(session: Session) -> list[Job]:
    """Queue the jobs that waited for what has come in; the files are in place whatever becomes of that."""
    from permed_compute.errors import PermedError

    settings = session.settings
    if not (settings.queue_url or settings.paths.database.exists()):
        return []  # this home has no jobs
    try:
        with session.client() as client:
            return client.service.arrived()
    except PermedError as error:
        session.note(f"The jobs that wait for it are not queued yet ({error.message}): type the same again.")
        return []


def _verifier(signers: Path, unsigned: bool) -> Verify:
    from permed_compute.errors import PermissionDeniedError
    from permed_compute.transfer import signing

    def verify(text: bytes, signature: bytes) -> str:
        if unsigned:
            return ""
        if not signature:
            raise PermissionDeniedError(
                "The set is not signed: anybody may have made it.",
                remedy="Have it sent with --key, or say --unsigned if you know where it comes from.",
            )
        return signing.verify(text, signature, signers)

    return verify


def _destination(
    session: Session, name: str, file: Path | None, direction: Direction, data_class: DataClass | None = None
) -> Destination:
    """The declared destination, or a folder of this machine. Raises `NotFoundError`, and what `permit` raises."""
    from permed_compute.errors import NotFoundError
    from permed_compute.spec import DataClass
    from permed_compute.transfer.destinations import FolderDestination, permit, read_destinations

    declared = file or session.settings.paths.destinations
    entries = read_destinations(declared) if file or declared.is_file() else {}
    entry: Destination | None = entries.get(name)
    if entry is None and Path(name).is_dir():
        entry = FolderDestination(kind="folder", path=str(Path(name).absolute()), max_data_class=DataClass.BLACK)
    if entry is None:
        known = f"Declared are: {', '.join(sorted(entries))}." if entries else f"Declare it in {declared}."
        raise NotFoundError(f"{name} is neither a declared destination nor a folder here.", remedy=known)
    permit(name, entry, direction, data_class)
    return entry


def _class(text: str) -> DataClass:
    from permed_compute.spec import DataClass

    try:
        return DataClass(text)
    except ValueError:
        raise typer.BadParameter(f"--data-class {text}: write green, yellow, red or black") from None


def _bytes(text: str) -> int:
    from permed_compute.spec import parse_memory

    try:
        return parse_memory(text) << 20 if text else 0
    except ValueError as error:
        raise typer.BadParameter(f"--volume: {error}") from None


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


@contextmanager
def bar(session: Session, what: str) -> Iterator[Progress]:
    """A bar on a terminal, a line per tenth elsewhere, nothing for JSON."""
    if session.as_json:
        yield lambda done, total: None
        return
    if not session.err.is_terminal:
        said = [0]

        def line(done: int, total: int) -> None:
            tenth = 10 * done // max(1, total)
            if tenth > said[0]:
                said[0] = tenth
                session.err.print(f"{what}: {10 * tenth} % of {words.size(total)}")

        yield line
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(
        TextColumn(what), BarColumn(bar_width=32), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(), console=session.err,
    ) as bars:  # fmt: skip
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
