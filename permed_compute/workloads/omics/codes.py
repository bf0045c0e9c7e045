"""Codes in clinical tables: HPO, ORPHA, SNOMED CT and ICD-10, checked by form and check digit, kept as CURIEs.

    checked_column(["HP:0001250", "", "HP_0000365;HP:0001263"], "HP")  →  ["HP:0001250", "", "HP:0000365|HP:0001263"]

What is checked is what a code says of itself: its form and, of SNOMED CT, the Verhoeff check digit and that it names a
concept (a description's or a relationship's number is the usual mistake). Whether the code exists, and in which
edition, is the terminology server's to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from permed_compute.errors import Finding, RefusedInput, WorkloadError

MISSING = {"", "NA", "na", "NaN", "nan", "None", "."}
_FORM = re.IGNORECASE | re.ASCII
"""ASCII: or digits of every script would be digits."""
_SEPARATORS = re.compile(r"[;|]")

# Verhoeff 1969, as SNOMED International prints it (TIG, "Check-digit computation"): products of the dihedral group of
# order ten, and the permutation of the first place; place k takes it k times.
_PRODUCT = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 0, 6, 7, 8, 9, 5), (2, 3, 4, 0, 1, 7, 8, 9, 5, 6),
    (3, 4, 0, 1, 2, 8, 9, 5, 6, 7), (4, 0, 1, 2, 3, 9, 5, 6, 7, 8), (5, 9, 8, 7, 6, 0, 4, 3, 2, 1),
    (6, 5, 9, 8, 7, 1, 0, 4, 3, 2), (7, 6, 5, 9, 8, 2, 1, 0, 4, 3), (8, 7, 6, 5, 9, 3, 2, 1, 0, 4),
    (9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
)  # fmt: skip
_PERMUTED = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def verhoeff(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it."""
    total, order = 0, list(range(10))
    for digit in reversed(digits):
        total = _PRODUCT[total][order[int(digit)]]
        order = [_PERMUTED[each] for each in order]
    return total == 0


class _WrongCodeError(ValueError):
    """args[0]: what is wrong, in words that hold nothing of the cell."""


def _hpo(text: str) -> str:
    found = re.fullmatch(r"(?:https?://purl\.obolibrary\.org/obo/)?HP[:_](\d{7})", text, _FORM)
    if not found:
        raise _WrongCodeError("is not HP: and seven digits")
    return f"HP:{found[1]}"


def _orpha(text: str) -> str:
    form = r"(?:https?://www\.orpha\.net/ORDO/)?(?:ORPHA|Orphanet)[:_ ]?([1-9]\d{0,5})"
    found = re.fullmatch(form, text, _FORM)
    if not found:
        raise _WrongCodeError("is not ORPHA: and a number of up to six digits")
    return f"ORPHA:{found[1]}"


def _snomed(text: str) -> str:
    form = r"(?:https?://snomed\.info/(?:id/|sct/))?(?:(?:SNOMED(?:CT|_CT| CT)?|SCTID|SCT):)?\s*([1-9]\d{5,17})"
    found = re.fullmatch(form, text, _FORM)
    if not found:
        raise _WrongCodeError("is not a number of 6 to 18 digits")
    if not verhoeff(found[1]):
        raise _WrongCodeError("has a wrong check digit")
    partition = found[1][-3:-1]
    if partition not in ("00", "10"):
        raise _WrongCodeError(f"is not a concept's number (partition {partition})")
    if partition == "10" and len(found[1]) < 11:
        raise _WrongCodeError("is an extension's without its namespace")
    return f"SNOMEDCT:{found[1]}"


def _icd10(text: str) -> str:
    # Up to four signs behind the point: national editions; the dagger and the asterisk of double coding are no part.
    form = r"(?:ICD-?10(?:-?(?:CM|NO|SE|GM))?:)?([A-Z]\d[0-9A-Z])(?:\.?([0-9A-Z]{1,4}))?[*+†]?"
    found = re.fullmatch(form, text.upper(), re.ASCII)
    if not found:
        raise _WrongCodeError("is not a letter, two digits and up to four signs behind a point")
    return f"ICD10:{found[1]}" + (f".{found[2]}" if found[2] else "")


SYSTEMS: dict[str, Callable[[str], str]] = {"HP": _hpo, "ORPHA": _orpha, "SNOMEDCT": _snomed, "ICD10": _icd10}
"""Known systems, by the prefix of their CURIEs."""


def checked(text: str, system: str) -> str:
    """One code as a CURIE. Raises `RefusedInput` WRONG_CODE, `WorkloadError` for a system that is not known."""
    return checked_column([text], system)[0]


def checked_column(values: Sequence[Any], system: str, *, people: Sequence[str] = (), column: str = "") -> list[str]:
    """Codes of a table's column as CURIEs, in order; a missing cell is '', several in a cell (`;` or `|`) join by `|`.

    people: whose the rows are, by pseudonym. Raises `RefusedInput` WRONG_CODE, which counts them all and names the
    first's row and person, never what stands in the cell; `WorkloadError` for a system that is not known.
    """
    if system not in SYSTEMS:
        raise WorkloadError(f"There is no code system {system!r}.", remedy=f"There are: {', '.join(SYSTEMS)}.")
    curies, wrong = [], []
    for row, value in enumerate(values):
        try:
            curies.append(_cell(value, SYSTEMS[system]))
        except _WrongCodeError as error:
            wrong.append((row, str(error)))
    if wrong:
        row, what = wrong[0]
        person = f" (person {people[row][:12]})" if len(people) else ""
        of = f" of column {column!r}" if column else ""
        finding = Finding(
            "WRONG_CODE",
            f"{len(wrong)} of {len(values)} cells{of} hold no {system} code; the first, row {row + 1}{person}, {what}.",
            "refused", numbers={"cells": len(wrong), "row": row + 1},
        )  # fmt: skip
        raise RefusedInput(finding, remedy="Correct the cell, or leave it empty where the code is not known.")
    return curies


def _cell(value: Any, one: Callable[[str], str]) -> str:
    if value is None or value != value or str(value).strip() in MISSING:  # NaN is not itself
        return ""
    if isinstance(value, float):
        raise _WrongCodeError("was read as a decimal number, which loses digits: read the column as text")
    return "|".join(one(code.strip()) for code in _SEPARATORS.split(str(value)) if code.strip())
