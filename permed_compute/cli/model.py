"""`permed model`: may a model be used on patients? Validate, promote, retire, and the documentation of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session
from permed_compute.errors import NotFoundError

app = typer.Typer(
    no_args_is_help=True,
    help="Models and patients: a job with `purpose: care` runs only with a model that was validated for its legal"
    " entity and intended use, and promoted.",
)
_Record = Annotated[str, typer.Argument(help="Record, or a model's digest; the first characters will do.")]
_COLOURS = {"promoted": "green", "passed": "cyan"}


@app.command("validate")
def validate(
    ctx: typer.Context,
    evaluation: Annotated[str, typer.Argument(metavar="EVALUATION", help="Job that judged the predictions.")],
    predictions: Annotated[str, typer.Option(metavar="JOB", help="Job that made them.")],
    criteria: Annotated[Path, typer.Option(metavar="FILE", help="What is asked of the model.")],
) -> None:
    """Judge a model by what an evaluation published, and record it. Exit 1 where it fails, which is recorded too.

    Example: permed model validate 01k9 --predictions 01k7 --criteria criteria.yaml
    """
    try:
        text = criteria.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"{criteria} cannot be read ({error.strerror}).") from None
    asked = {"evaluation": evaluation, "predictions": predictions, "criteria": text, "source": str(criteria)}
    row = _ruled(ctx, "validate", asked)
    Session.of(ctx).answer(row, lambda console: _one(console, row))
    if row["failures"]:
        raise typer.Exit(Exit.FAILED)


@app.command("promote")
def promote(
    ctx: typer.Context,
    record: _Record,
    own_work: Annotated[str, typer.Option(help="Why the person who validated it promotes it too.", metavar="WHY")] = "",
) -> None:
    """Let a validated model be used for care. By an operator; by another person than the one who validated it.

    Example: permed model promote v3f9a2
    """
    row = _ruled(ctx, "promote", {"record": record, "own_work": own_work})
    Session.of(ctx).answer(row, f"promoted: {row['record']}, {row['title']} for {row['entity']}")


@app.command("retire")
def retire(
    ctx: typer.Context,
    record: _Record,
    why: Annotated[str, typer.Option("--why", help="It stays in the log.")],
) -> None:
    """Take a model out of care: nothing new starts with it; what runs goes on (`permed cancel` ends it).

    Example: permed model retire v3f9a2 --why "replaced by version 2"
    """
    row = _ruled(ctx, "retire", {"record": record, "why": why})
    Session.of(ctx).answer(row, f"retired: {row['title']} for {row['entity']}")


@app.command("issue")
def issue(
    ctx: typer.Context,
    record: _Record,
    text: Annotated[str, typer.Argument(help="What was seen in use; nothing that names a person.")],
) -> None:
    """Record experience from clinical use; it is part of the documentation.

    Example: permed model issue v3f9a2 "misses lesions below 3 mm in the brain stem"
    """
    row = _ruled(ctx, "issue", {"record": record, "text": text})
    Session.of(ctx).answer(row, f"recorded: {len(row['issues'])} issues of {row['title']}")


@app.command("list")
def list_models(ctx: typer.Context) -> None:
    """List all records: which model, for whom, for what, and what each is worth now.

    Example: permed model list
    """
    session = Session.of(ctx)
    with session.client() as client:
        rows = client.service.models()

    def show(console: Any) -> None:
        from rich.markup import escape

        table = words.table("RECORD", "MODEL", "TITLE", "ENTITY", "USE", "STANDING", "UNTIL", "USES")
        for row in rows:
            table.add_row(
                row["record"], row["model"][:12], escape(row["title"]), row["entity"],
                row["criteria"]["intended_use"]["name"], _standing(row), _day(row["expires"]), str(row["uses"]),
            )  # fmt: skip
        console.print(table if rows else "No model has been validated here.")

    session.answer(rows, show)


@app.command("show")
def show_model(ctx: typer.Context, record: _Record) -> None:
    """Show a record: what was asked, what was found, who promoted it.

    Example: permed model show v3f9a2
    """
    row = _found(ctx, record)
    Session.of(ctx).answer(row, lambda console: _one(console, row))


@app.command("doc")
def doc(
    ctx: typer.Context,
    record: _Record,
    to: Annotated[Path, typer.Option("--to", help="Folder for the documents.")],
) -> None:
    """Write the documentation of MDR Article 5(5) from the records. Exit 3 where something has still to be stated.

    Example: permed model doc v3f9a2 --to lesions-mdr
    """
    from permed_compute.governance import document
    from permed_compute.paths import read_json

    session = Session.of(ctx)
    row = _found(ctx, record)
    kept = read_json(session.settings.paths.models / f"{row['kept']}.json")
    if kept is None:
        raise NotFoundError(f"The evidence of {row['record']} is not in this home.", remedy="Restore `models/` of it.")
    made = document.rendered(row, kept)
    document.write(made, to)

    def show(console: Any) -> None:
        console.print(f"{len(made.files)} files in {to}", markup=False)
        for what in made.missing:
            console.print(f"[yellow]not stated:[/] {what}")

    session.answer({"folder": str(to.resolve()), "files": sorted(made.files), "missing": list(made.missing)}, show)
    if made.missing:
        raise typer.Exit(Exit.PARTIAL)


def _ruled(ctx: typer.Context, action: str, data: dict[str, str]) -> dict[str, Any]:
    with Session.of(ctx).client() as client:
        return dict(client.service.model(action, data))


def _found(ctx: typer.Context, name: str) -> dict[str, Any]:
    from permed_compute.governance.records import named

    with Session.of(ctx).client() as client:
        return dict(named(client.service.models(), name))


def _one(console: Any, row: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.text import Text

    from permed_compute.governance.judge import shown

    console.print(words.facts([
        ("record", row["record"]), ("standing", Text(row["standing"], _COLOURS.get(row["standing"], "red"))),
        ("model", f"{row['title']} ({row['model']})"), ("legal entity", row["entity"]),
        ("intended use", row["criteria"]["intended_use"]["statement"]),
        ("workloads", ", ".join(f"{name} (version {version})" for name, version in row["workloads"].items())),
        ("dataset", f"{row['cases']} cases of {row['patients']} patients ({row['dataset'][:16]})"),
        ("validated", f"{_day(row['validated_at'])} by {row['validated_by']}, until {_day(row['expires'])}"),
        ("promoted", f"{_day(row['promoted_at'])} by {row['promoted_by']}" if row["promoted_at"] else ""),
        ("alone, because", row["own_work"]),
        ("retired", f"{_day(row['retired_at'])}: {row['why']}" if row["retired_at"] else ""),
        ("uses", row["uses"] or ""), ("issues", len(row["issues"]) or ""),
    ]))  # fmt: skip
    marks = {"met": "[green]✓[/]", "missed": "[red]✗[/]", "few": "[yellow]–[/]"}
    for each in row["judged"]:
        who = f"{each['trait']} {each['group']}" if each["trait"] else "everybody"
        bound = f"≥ {each['least']:g}" if each["least"] is not None else f"≤ {each['most']:g}"
        console.print(
            f"{marks[each['verdict']]} {escape(each['measure'])}, {escape(who)}: {shown(each['value'])}"
            f" ({each['of']}, {each['patients']} patients), {bound}"
        )
    for failure in row["failures"]:
        console.print(f"[red]failed:[/] {escape(failure)}")


def _standing(row: dict[str, Any]) -> str:
    return f"[{_COLOURS.get(row['standing'], 'red')}]{row['standing']}[/]"


def _day(ms: int) -> str:
    return words.moment(ms)[:10]
