"""Pharmacogenetic results: star alleles of a gene, and their FHIR R4 in the Genomics Reporting guide's names (3.0.0).

`read(path)` takes a caller's table (tab-separated): gene, diplotype and, where the caller says it, phenotype and
activity_score. What stands in it is the caller's; here it is checked by form, never interpreted: which phenotype a
diplotype has is CPIC's and changes with its editions.

    http://hl7.org/fhir/uv/genomics-reporting/STU3/   genotype (LOINC 84413-4), therapeutic-implication
"""

from __future__ import annotations

import csv
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.errors import Finding, RefusedInput

METABOLIZERS = {
    "ultrarapid metabolizer": "LA10315-2", "rapid metabolizer": "LA25390-8", "normal metabolizer": "LA25391-6",
    "intermediate metabolizer": "LA10317-8", "poor metabolizer": "LA9657-3",
}  # fmt: skip
"""LOINC's answers (value set genetic-therapeutic-implications-vs). Others ("indeterminate") are told in words."""

_GENES = {
    "CYP2B6": "HGNC:2615", "CYP2C19": "HGNC:2621", "CYP2C9": "HGNC:2623", "CYP2D6": "HGNC:2625", "CYP3A5": "HGNC:2638",
    "DPYD": "HGNC:3012", "NUDT15": "HGNC:23063", "SLCO1B1": "HGNC:10959", "TPMT": "HGNC:12014", "UGT1A1": "HGNC:12530",
}  # fmt: skip
_GUIDE = "http://hl7.org/fhir/uv/genomics-reporting"
_LOINC, _HGNC = "http://loinc.org", "http://www.genenames.org"
_NAMES = uuid.UUID("6f1d3c1e-6d0a-4f53-9f0b-6f5a2f3f0d11")
_ALLELE = r"\*\d{1,3}[A-Z]?(?:\.\d{1,3})?(?:x(?:\d{1,2}|N))?"
_DIPLOTYPE = re.compile(rf"{_ALLELE}(?:\+{_ALLELE})*/{_ALLELE}(?:\+{_ALLELE})*")
_SYMBOL = re.compile(r"[A-Z][A-Z0-9-]{1,15}")


@dataclass(frozen=True, slots=True)
class StarAlleles:
    """Both alleles of a gene. diplotype: `*1/*4`, with copies (`*2x2`) and hybrids (`*36+*10`) as PharmVar writes them.

    phenotype: in the caller's words, '' where it says none. activity: the activity score, None where there is none.
    """

    gene: str
    diplotype: str
    phenotype: str = ""
    activity: float | None = None


def read(path: Path) -> list[StarAlleles]:
    """Rows of a caller's table. Raises `RefusedInput`: STAR_TABLE_UNREADABLE, STAR_ALLELE_UNREADABLE, NOT_A_NUMBER,
    DUPLICATE_GENE, each with the row."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t")
        names = {(name or "").strip().lower(): name for name in lines.fieldnames or []}
        if not {"gene", "diplotype"} <= set(names):
            raise _refused("STAR_TABLE_UNREADABLE", "The table of star alleles has no columns gene and diplotype.")
        rows = [{key: (line[name] or "").strip() for key, name in names.items()} for line in lines]
    found: dict[str, StarAlleles] = {}
    for number, row in enumerate(rows, 2):
        one = _row(row, number)
        if one.gene in found:
            raise _refused("DUPLICATE_GENE", f"Row {number} names {one.gene} a second time.", row=number)
        found[one.gene] = one
    return list(found.values())


def _row(row: Mapping[str, str], number: int) -> StarAlleles:
    gene, diplotype, activity = row["gene"], row["diplotype"].replace(" ", ""), row.get("activity_score", "")
    if not _SYMBOL.fullmatch(gene) or not _DIPLOTYPE.fullmatch(diplotype):
        raise _refused(
            "STAR_ALLELE_UNREADABLE", f"Row {number} is no gene with two star alleles, such as CYP2D6 and *1/*4.",
            row=number,
        )  # fmt: skip
    try:
        score = float(activity) if activity and activity.lower() not in ("na", "n/a") else None
    except ValueError:
        raise _refused("NOT_A_NUMBER", f"Row {number} has an activity score that is no number.", row=number) from None
    return StarAlleles(gene, diplotype, row.get("phenotype", ""), score)


def _refused(code: str, sentence: str, **numbers: Any) -> RefusedInput:
    return RefusedInput(Finding(code, sentence, "refused", "", numbers), remedy="Look at the caller's output.")


# --------------------------------------------------------------------------------------------- FHIR


def bundle(results: Sequence[StarAlleles], pseudonym: str) -> dict[str, Any]:
    """A FHIR R4 Bundle (collection): a genotype for each gene, and what it means for drugs where the caller says it.

    The same results give the same bytes: ids follow from pseudonym and gene. The person is a logical reference by
    pseudonym; whoever sends it on to a record puts the patient there.
    """
    entries = []
    for one in results:
        genotype = _genotype(one, pseudonym)
        entries.append(genotype)
        if one.phenotype:
            entries.append(_implication(one, pseudonym, genotype["id"]))
    rows = [{"fullUrl": f"urn:uuid:{entry['id']}", "resource": entry} for entry in entries]
    return {"resourceType": "Bundle", "type": "collection", "entry": rows}


def _observation(profile: str, gene: str, pseudonym: str) -> dict[str, Any]:
    laboratory = {"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "laboratory"}
    genetics = {"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "GE"}
    return {
        "resourceType": "Observation",
        "id": str(uuid.uuid5(_NAMES, f"{profile}:{pseudonym}:{gene}")),
        "meta": {"profile": [f"{_GUIDE}/StructureDefinition/{profile}"]},
        "status": "preliminary",  # nobody has signed it
        "category": [{"coding": [laboratory]}, {"coding": [genetics]}],
        "subject": {"identifier": {"system": "urn:permed:pseudonym", "value": pseudonym}},
    }


def _coded(system: str, code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code, "display": display}]}


def _genotype(one: StarAlleles, pseudonym: str) -> dict[str, Any]:
    gene: dict[str, Any] = {"text": one.gene}
    if one.gene in _GENES:
        gene = _coded(_HGNC, _GENES[one.gene], one.gene)
    components = [{"code": _coded(_LOINC, "48018-6", "Gene studied [ID]"), "valueCodeableConcept": gene}]
    if one.activity is not None:
        components.append({"code": {"text": "Activity score"}, "valueQuantity": {"value": one.activity}})
    return _observation("genotype", one.gene, pseudonym) | {
        "code": _coded(_LOINC, "84413-4", "Genotype display name"),
        "valueCodeableConcept": {"text": f"{one.gene} {one.diplotype}"},
        "component": components,
    }


def _implication(one: StarAlleles, pseudonym: str, genotype: str) -> dict[str, Any]:
    code = _coded(f"{_GUIDE}/CodeSystem/tbd-codes-cs", "therapeutic-implication", "Therapeutic Implication")
    answer = METABOLIZERS.get(one.phenotype.lower())
    value = _coded(_LOINC, answer, one.phenotype.capitalize()) if answer else {"text": one.phenotype}
    return _observation("therapeutic-implication", one.gene, pseudonym) | {
        "code": code,
        "derivedFrom": [{"reference": f"urn:uuid:{genotype}"}],
        "component": [{"code": code, "valueCodeableConcept": value}],
    }
