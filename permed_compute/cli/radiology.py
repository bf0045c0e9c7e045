"""`permed radiology`: what a reading room has beside jobs: a listener, de-identification, and answers to worklists."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import jobfile, words
from permed_compute.cli.exits import Exit
from permed_compute.cli.jobs import JobArgument
from permed_compute.cli.session import Session
from permed_compute.errors import NotFoundError, PermedError

if TYPE_CHECKING:
    from permed_compute.queue.port import Job
    from permed_compute.workloads.radiology.archives import Tls
    from permed_compute.workloads.radiology.listen import Closed
    from permed_compute.workloads.radiology.pacs import Archive

app = typer.Typer(
    no_args_is_help=True, help="Archives, worklists and their answers, images by C-STORE, and de-identification."
)
_LOOK_S = 1.0
_ANSWER = "answer"
_Archives = Annotated[Path, typer.Argument(help="The site's archives file.", metavar="ARCHIVES")]
_ToFolder = Annotated[Path | None, typer.Option("--to", help="Folder for the answer; default `answer` in the results.")]


@app.command("worklist")
def worklist(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="CSV of accession numbers or study UIDs.", metavar="LIST")],
    archives: Annotated[Path, typer.Option(help="The site's archives file.")],
    source: Annotated[str, typer.Option("--from", help="Archive that has the studies.")],
    returns: Annotated[
        list[str] | None, typer.Option("--return", help="Archive that gets results. Repeatable.")
    ] = None,
    job: Annotated[str, typer.Option(help="Job file that says the rest.")] = "radiology/worklist",
    sets: jobfile.SetOption = None,
    to: _ToFolder = None,
) -> None:
    """Run a worklist and write its answer: what became of each row, as CSV, JSON and a page with pictures.

    Example: permed radiology worklist tonight.csv --archives archives.yaml --from pacs --return pacs
    """
    from permed_compute.cli.run import summary, work_off
    from permed_compute.cli.submit import checked

    session = Session.of(ctx)
    inputs = [f"worklist={file.resolve()}", f"archives={archives.resolve()}"]
    where = f"params.returns=[{','.join(returns)}]" if returns else ""
    spec = checked(job, [*(sets or []), f"params.archive={source}", *filter(None, [where])], inputs)
    done = work_off(session, lambda client: client.submit(spec))
    (finished,) = done.jobs
    folder = session.settings.paths.job(finished.id).results
    if not folder.is_dir():
        summary(session.err, session, done)
        raise typer.Exit(done.code or Exit.FAILED)
    _show(session, finished, to)
    if done.code:
        raise typer.Exit(done.code)


@app.command("answer")
def answer(ctx: typer.Context, job: JobArgument, to: _ToFolder = None) -> None:
    """Write the answer of a worklist that has ended: done, rejected or failed, row by row.

    Example: permed radiology answer 01k9 --to tonight
    """
    session = Session.of(ctx)
    with session.client() as client:
        found = client.service.job(job)
    _show(session, found, to)


def _show(session: Session, job: Job, to: Path | None) -> None:
    from permed_compute.execution.context import pseudonym_key, pseudonym_of
    from permed_compute.paths import read_json
    from permed_compute.workloads.radiology import answer as answers
    from permed_compute.workloads.radiology.orders import read_orders
    from permed_compute.workloads.radiology.worklist import item_name

    results = session.settings.paths.job(job.id).results
    result = read_json(results / "result.json")
    path = next((ref.path for ref in job.spec.inputs if ref.name == "worklist"), "")
    if result is None or not path:
        raise NotFoundError(f"Job {job.id} has no answer: it is {job.state}.", remedy=f"permed why {job.id}")
    key = pseudonym_key(session.settings.paths)
    rows = answers.rows_of(
        read_orders(Path(path)), lambda order: item_name(lambda text: pseudonym_of(key, text), order), result
    )
    folder = (to or results / _ANSWER).resolve()
    answers.write_answer(rows, results, folder)
    counted = answers.counts(rows)

    def show(console: Any) -> None:
        from rich.markup import escape

        console.print(", ".join(f"{count} {outcome}" for outcome, count in counted.items()))
        for row in [row for row in rows if row.outcome != "done"][:20]:
            console.print(f"row {row.row}  [yellow]{row.outcome}[/]  {row.code}  {escape(row.reason)}")
        console.print(words.facts([("page", folder / answers.PAGE), ("table", folder / answers.CSV)]))

    session.answer({"job": job.id, "folder": str(folder), "counts": counted}, show)


@app.command("check")
def check(ctx: typer.Context, archives: _Archives) -> None:
    """Ask every archive of the file whether it knows us: a query by DICOMweb, an echo by DICOM. Nothing is fetched.

    Example: permed radiology check archives.yaml
    """
    from permed_compute.workloads.radiology.archives import read_archives
    from permed_compute.workloads.radiology.pacs import Archive

    rows = []
    for name, entry in read_archives(archives).items():
        for kind in [kind for kind, there in (("dicomweb", entry.web), ("dicom", entry.dimse)) if there is not None]:
            row = {"archive": name, "by": kind, "clinical": entry.clinical, "answers": True, "reason": ""}
            try:
                _ask(Archive(entry), kind)
            except PermedError as error:
                row |= {"answers": False, "reason": str(error)}
            rows.append(row)
    Session.of(ctx).answer(rows, "\n".join(map(_checked, rows)))
    if not all(row["answers"] for row in rows):
        raise typer.Exit(Exit.FAILED)


def _ask(archive: Archive, kind: str) -> None:
    if kind == "dicom":
        archive.echo()
    else:
        archive.find(accession="PERMED-CHECK")


def _checked(row: dict[str, Any]) -> str:
    from rich.markup import escape

    mark = "[green]✓[/]" if row["answers"] else "[red]✗[/]"
    kind = "clinical" if row["clinical"] else "not clinical"
    return f"{mark} {escape(row['archive'])} by {row['by']} ({kind})  {escape(row['reason'])}".rstrip()


@app.command("listen")
def listen(
    ctx: typer.Context,
    to: Annotated[Path, typer.Option("--to", help="Folder: `incoming` while they arrive, `studies` once closed.")],
    senders: Annotated[list[str], typer.Option("--from", help="AE title that may send. Repeatable; nobody else may.")],
    title: Annotated[str, typer.Option(help="Our AE title.")] = "PERMED",
    port: Annotated[int, typer.Option(help="TCP port.")] = 11112,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with TLS.")] = "127.0.0.1",
    quiet: Annotated[str, typer.Option(help="Nothing new for so long closes a study that is whole.")] = "60s",
    patience: Annotated[str, typer.Option(help="So long one with holes waits for the rest.")] = "15m",
    tls: Annotated[
        tuple[str, str, str] | None, typer.Option(help="Files: authority of the senders, our certificate, our key.")
    ] = None,
    studies: Annotated[int, typer.Option(help="Stop after so many studies; 0: never.")] = 0,
) -> None:
    """Take images by C-STORE and close a study when its content is whole and nothing has come for a while.

    Example: permed radiology listen --to incoming --from SCANNER1 --from PACS
    """
    from permed_compute.workloads.radiology.archives import Tls
    from permed_compute.workloads.radiology.listen import Listener

    session = Session.of(ctx)
    secured: Tls | None = Tls(*tls) if tls else None
    listener = Listener(
        to, title, senders, port, host, words.duration(quiet), words.duration(patience), secured,
    )  # fmt: skip
    session.note(f"{title} listens on {host}:{listener.start()} for {', '.join(senders)}; Ctrl-C ends it")
    closed: list[Closed] = []
    try:
        while not studies or len(closed) < studies:
            for study in listener.close_studies():
                closed.append(study)
                holes = f"  {' '.join(study.holes)}" if study.holes else ""
                session.note(f"{study.folder.name}  {study.instances} images, {study.series} series{holes}")
            time.sleep(_LOOK_S)
    finally:
        listener.stop()
    session.answer(
        [{"folder": str(s.folder), "instances": s.instances, "whole": s.whole, "holes": list(s.holes)} for s in closed],
        f"{len(closed)} studies closed",
    )


@app.command("deidentify")
def deidentify(
    ctx: typer.Context,
    source: Annotated[list[Path], typer.Argument(help="DICOM folders, zips or files.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the clean copies: subject/study/series.")],
    key: Annotated[Path, typer.Option(help="The site's key, a file of mode 0600; keep it away from the copies.")],
    new_key: Annotated[bool, typer.Option("--new-key", help="Make the key first; it must not be there.")] = False,
    keep_characteristics: Annotated[
        bool, typer.Option("--keep-characteristics", help="Keep sex, age (89 at most), height and weight, for SUVs.")
    ] = False,
    vouched: Annotated[
        bool, typer.Option("--vouched", help="You have looked: no text is burned in where files do not say.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Files at a time.")] = 2,
) -> None:
    """De-identify images by the DICOM PS3.15 basic profile. What may show a person is refused, by digest.

    Example: permed radiology deidentify scans --to clean --key site.key --new-key
    """
    from permed_compute.storage.digests import DigestCache
    from permed_compute.workloads.radiology import deidentify as profile
    from permed_compute.workloads.radiology.read import find

    session = Session.of(ctx)
    if new_key:
        profile.new_key(key)
    by = profile.Deidentifier(profile.read_key(key), keep_characteristics=keep_characteristics, vouched=vouched)
    sources = [found for path in source for found in find(path)]
    rows = list(profile.deidentify(sources, to, by, DigestCache(to / ".digests").digest, threads))
    refused = [finding for row in rows if not row.file for finding in row.findings]
    written = sum(bool(row.file) for row in rows)

    def show(console: Any) -> None:
        console.print(f"{written} images in {to}, {sum(row.already for row in rows)} of them there before")
        for finding in refused[:20]:
            console.print(f"[red]✗[/] {finding.about[:16]}  {finding.code}  {finding.sentence}")
        if len(refused) > 20:
            console.print(f"… and {len(refused) - 20} more")

    session.answer(
        {"written": written, "left_out": [finding.as_dict() for finding in refused],
         "notes": [f.as_dict() for row in rows if row.file for f in row.findings]},
        show,
    )  # fmt: skip
    if refused:
        raise typer.Exit(Exit.PARTIAL if written else Exit.REFUSED)
