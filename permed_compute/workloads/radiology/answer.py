"""The answer to a worklist: a row for every row of the list, with what became of it, as CSV, JSON and a page.

    done       results are there, and where they were returned
    rejected   the study cannot be computed on, and why; the same answer would come again
    failed     something went wrong on the way; running the job again tries it again

The CSV and the JSON name examinations as the worklist did: they go back to who wrote it. The page names rows and
pseudonyms only, so that it can be shown.
"""

from __future__ import annotations

import base64
import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.paths import read_json, replacing, write_json
from permed_compute.reports.html import render, scalars
from permed_compute.workloads.radiology.orders import Order

CSV, JSON, PAGE = "answer.csv", "answer.json", "answer.html"
_OUTCOMES = {"DONE": "done", "REUSED": "done", "REFUSED": "rejected"}
_TONES = {"done": "good", "rejected": "warn", "failed": "bad"}
_COLUMNS = (
    "row",
    "accession_number",
    "study_instance_uid",
    "item",
    "outcome",
    "code",
    "reason",
    "measurements",
    "returned",
)
_MOST_PICTURES = 200


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one row of the worklist."""

    row: int
    item: str
    outcome: str
    code: str = ""
    reason: str = ""
    series: Mapping[str, Any] = field(default_factory=dict)
    returned: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    accession_number: str = field(default="", repr=False)
    study_instance_uid: str = field(default="", repr=False)


def rows_of(orders: Sequence[Order], name_of: Callable[[Order], str], result: Mapping[str, Any]) -> list[Row]:
    """A row for each order. `result`: the job's result.json; `name_of`: the part's name of an order."""
    parts = {part["name"]: part for part in result.get("parts") or ()}
    return [_row(order, name_of(order), parts.get(name_of(order))) for order in orders]


def _row(order: Order, name: str, part: Mapping[str, Any] | None) -> Row:
    who: dict[str, Any] = {"accession_number": order.accession, "study_instance_uid": order.study}
    if part is None:
        return Row(order.number, name, "failed", "not-run", "The job ended before this row's turn.", **who)
    outcome = _OUTCOMES.get(str(part.get("state")), "failed")
    values = part.get("values") or {}
    if outcome != "done":
        findings: Sequence[Mapping[str, Any]] = part.get("findings") or ()
        refusal: Mapping[str, Any] = next((f for f in findings if f.get("severity") == "refused"), {})
        reason = refusal.get("sentence") or part.get("reason") or "No reason was recorded."
        return Row(order.number, name, outcome, refusal.get("code") or part.get("code") or "", reason, **who)
    pictures = tuple(f"parts/{name}/{picture}" for picture in values.get("thumbnails", ()))
    return Row(
        order.number, name, outcome, series=values.get("series", {}), returned=values.get("returned", {}),
        findings=tuple(values.get("findings", ())), pictures=pictures, **who,
    )  # fmt: skip


def counts(rows: Sequence[Row]) -> dict[str, int]:
    found = Counter(row.outcome for row in rows)
    return {outcome: found[outcome] for outcome in ("done", "rejected", "failed")}


def write_answer(rows: Sequence[Row], results: Path, folder: Path) -> None:
    """answer.csv, answer.json and answer.html in `folder`; pictures and the manifest are read from `results`."""
    job = (read_json(results / "manifest.json") or {}).get("job", {})
    write_json(folder / JSON, {
        "job": job.get("id", ""), "purpose": job.get("purpose", ""), "counts": counts(rows),
        "rows": [asdict(row) for row in rows],
    })  # fmt: skip
    with replacing(folder / CSV) as new, new.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        table.writerows([_cells(row) for row in rows])
    with replacing(folder / PAGE) as new:
        new.write_text(_page(rows, results, job), encoding="utf-8")


def _cells(row: Row) -> list[Any]:
    measured = {
        f"{label}.{name}": value
        for series in row.series.values()
        for label, figures in series.items()
        for name, value in figures.items()
    }
    returned = " ".join(
        f"{name}:{place['by']}:{place['sent']}+{place['already']}" for name, place in row.returned.items()
    )
    cells = [
        row.row, row.accession_number, row.study_instance_uid, row.item, row.outcome, row.code, row.reason,
        json.dumps(measured, ensure_ascii=False) if measured else "", returned,
    ]  # fmt: skip
    return [_plain(cell) for cell in cells]


def _plain(cell: Any) -> Any:
    """Spreadsheets run what begins like a formula; an accession number may."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") else cell


def _page(rows: Sequence[Row], results: Path, job: Mapping[str, Any]) -> str:
    shown = 0
    items = []
    for row in rows:
        pictures = []
        for name in row.pictures:
            file = results / name
            if shown < _MOST_PICTURES and file.is_file():
                pictures.append(f"data:image/jpeg;base64,{base64.b64encode(file.read_bytes()).decode()}")
                shown += 1
        items.append({
            "row": row.row, "item": row.item, "outcome": row.outcome, "tone": _TONES[row.outcome], "code": row.code,
            "reason": row.reason, "findings": row.findings, "pictures": pictures,
            "measured": [pair for series in row.series.values() for pair in scalars(series)],
            "returned": [(name, place["by"], place["sent"], place["already"]) for name, place in row.returned.items()],
        })  # fmt: skip
    items.sort(key=lambda item: item["outcome"] == "done")  # what needs a reader's eye stands first
    return render(
        "answer.html.j2", name=job.get("name", "Worklist"), job=job.get("id", ""), items=items, counts=counts(rows),
        research=job.get("purpose") != "care", total=len(rows), tones=_TONES,
    )  # fmt: skip
