"""The list of examinations that somebody wants computed: CSV with accession numbers, study UIDs, or both.

    accession_number,study_instance_uid
    A4711,
    ,1.2.840.113619.2.5

Separated by comma, semicolon or tab. Other columns are left alone, and the order too: the answer has a row for each.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from permed_compute.errors import NotFoundError, Problem, SpecError
from permed_compute.workloads.radiology.pacs import LONGEST_UID, UID

_ACCESSION = ("accession_number", "accession", "accessionnumber")
_STUDY = ("study_instance_uid", "study_uid", "studyinstanceuid", "study")
_LONGEST_ACCESSION = 16
_MOST = 100_000


@dataclass(frozen=True, slots=True)
class Order:
    """One row. number counts the rows from 1, without the header. problem: why it cannot be asked for; ''."""

    number: int
    accession: str = field(repr=False)
    study: str = field(repr=False)
    problem: str = ""

    @property
    def identity(self) -> str:
        """What the pseudonym of the item is made of."""
        return f"{self.accession}\x1f{self.study}"


def read_orders(path: Path) -> list[Order]:
    """All rows, the impossible ones with their problem. Raises `NotFoundError`, `SpecError` (no column, no row)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError:
        raise NotFoundError("There is no worklist.", remedy="Name it as the job's input `worklist`.") from None
    except UnicodeDecodeError:
        raise SpecError("worklist", [Problem("file", "is not UTF-8 text")]) from None
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = list(csv.reader(io.StringIO(text), delimiter=separator))
    names = [name.strip().casefold().replace(" ", "_") for name in rows[0]] if rows else []
    accession, study = (next((names.index(n) for n in wanted if n in names), None) for wanted in (_ACCESSION, _STUDY))
    if accession is None and study is None:
        remedy = "Name one accession_number or study_instance_uid, in the first row."
        raise SpecError("worklist", [Problem("columns", "none is an accession number or a study UID", 1, remedy)])
    orders = [
        _order(number, _cell(row, accession), _cell(row, study))
        for number, row in enumerate((row for row in rows[1:] if any(cell.strip() for cell in row)), 1)
    ]
    if not orders or len(orders) > _MOST:
        raise SpecError("worklist", [Problem("rows", f"there are {len(orders)}; 1 to {_MOST} make a job")])
    return _once(orders)


def _cell(row: list[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _order(number: int, accession: str, study: str) -> Order:
    problem = ""
    if not accession and not study:
        problem = "has neither accession number nor study UID"
    elif study and (not UID.fullmatch(study) or len(study) > LONGEST_UID):
        problem = "has a study UID that is none"
    elif any(mark in accession for mark in "*?\\") or len(accession) > _LONGEST_ACCESSION:
        # In a query these are wildcards: one row would ask for the whole archive.
        problem = "has an accession number that is a pattern or too long"
    return Order(number, accession, study, problem)


def _once(orders: list[Order]) -> list[Order]:
    seen: dict[str, int] = {}
    result = []
    for order in orders:
        first = seen.setdefault(order.identity, order.number) if not order.problem else order.number
        problem = order.problem or (f"repeats row {first}" if first != order.number else "")
        result.append(Order(order.number, order.accession, order.study, problem))
    return result
