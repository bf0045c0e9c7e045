"""Codes: what each system's form and check digit let through, and what a wrong one says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permed_compute.errors import RefusedInput, WorkloadError
from permed_compute.workloads.omics import codes


@pytest.mark.parametrize(
    ("system", "written", "curie"),
    [
        ("HP", "HP:0001250", "HP:0001250"),
        ("HP", "http://purl.obolibrary.org/obo/HP_0001250", "HP:0001250"),
        ("ORPHA", "ORPHA558", "ORPHA:558"),
        ("ORPHA", "Orphanet:558", "ORPHA:558"),
        # SNOMED International's own: root, myocardial infarction, the core module, and an extension's with namespace.
        ("SNOMEDCT", "138875005", "SNOMEDCT:138875005"),
        ("SNOMEDCT", "http://snomed.info/id/22298006", "SNOMEDCT:22298006"),
        ("SNOMEDCT", 900000000000207008, "SNOMEDCT:900000000000207008"),
        ("SNOMEDCT", "999480561000087100", "SNOMEDCT:999480561000087100"),
        ("ICD10", "C911", "ICD10:C91.1"),
        ("ICD10", "c91.1", "ICD10:C91.1"),
        ("ICD10", "ICD-10:G01*", "ICD10:G01"),
    ],
)
def test_codes_become_curies(system, written, curie):
    assert codes.checked(written, system) == curie


@pytest.mark.parametrize(
    ("system", "written", "why"),
    [
        ("HP", "HP:12", "seven digits"),
        ("ORPHA", "ORPHA:0558", "number"),
        ("SNOMEDCT", "138875006", "check digit"),
        ("SNOMEDCT", "138875005.0", "6 to 18 digits"),
        ("SNOMEDCT", "13887500٥", "6 to 18 digits"),
        ("SNOMEDCT", 1.38875005e8, "text"),
        ("SNOMEDCT", "680946014", "concept"),  # the description of 138875005's kind: partition 01
        ("ICD10", "911", "letter"),
        ("ICD10", "C91.12345", "letter"),
    ],
)
def test_what_is_no_code_is_refused_without_being_repeated(system, written, why):
    with pytest.raises(RefusedInput) as refused:
        codes.checked_column(["", written], system, people=["p-1", "p-2"], column="diagnosis")
    said = str(refused.value)
    assert why in said and "row 2" in said and "p-2" in said and "'diagnosis'" in said
    assert str(written) not in said
    assert refused.value.finding.code == "WRONG_CODE"


def test_missing_and_several():
    found = codes.checked_column([None, float("nan"), "NA", "HP:0001250; HP_0000365"], "HP")
    assert found == ["", "", "", "HP:0001250|HP:0000365"]


def test_every_wrong_cell_is_counted():
    with pytest.raises(RefusedInput) as refused:
        codes.checked_column(["HP:0001250", "x", "y"], "HP")
    assert refused.value.finding.numbers == {"cells": 2, "row": 2}


def test_a_system_that_is_not_known():
    with pytest.raises(WorkloadError, match="SNOMEDCT"):
        codes.checked("1", "LOINC")


@given(st.from_regex(r"[1-9][0-9]{2,14}", fullmatch=True))
def test_verhoeff_sees_each_wrong_digit_and_each_exchange_of_neighbours(item):
    (check,) = [digit for digit in "0123456789" if codes.verhoeff(item + digit)]
    whole = item + check
    for place, digit in enumerate(whole):
        assert not codes.verhoeff(whole[:place] + str((int(digit) + 1) % 10) + whole[place + 1 :])
        if place and whole[place - 1] != digit:
            assert not codes.verhoeff(whole[: place - 1] + digit + whole[place - 1] + whole[place + 1 :])
