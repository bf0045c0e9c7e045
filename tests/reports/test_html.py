from __future__ import annotations

import math

import pytest

from permed_compute.reports.html import amount, bytesize, label, number, scalars, seconds, when


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"), (192, "192"), (1_234_567, "1 234 567"), (True, "yes"), (0.9962, "0.9962"), (12.5, "12.5"),
        (1403.27, "1 403.3"), (100.0, "100"), (123456.7, "123 457"), (0.00001234, "1.23e-05"),
        (math.nan, "not a number"), ("text", "text"), (0.0, "0"), (-3.25, "-3.25"),
    ],
)  # fmt: skip
def test_number(value: object, words: str) -> None:
    assert number(value).replace("\u202f", " ") == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.042, "42 ms"), (20.14, "20.1 s"), (125, "2 min 5 s"), (11520, "3 h 12 min"), (None, "")]
)
def test_seconds(value: object, words: str) -> None:
    assert seconds(value).replace("\u202f", " ") == words


def test_units_come_from_the_end_of_the_name() -> None:
    assert (label("brain_volume_ml"), amount(1.5, "brain_volume_ml")) == ("Brain volume", "1.5\u202fml")
    assert (label("slices"), amount(3, "slices")) == ("Slices", "3")
    assert amount(0.5, "infer_s") == "500\u202fms"


def test_nested_values_keep_their_group_and_its_unit() -> None:
    rows = scalars({"volumes_ml": {"brain": 1.0}, "spacing_mm": [1.0, 1.0, 1.25], "long": [1] * 9, "name": "x"})
    assert rows == [("volumes.brain_ml", 1.0), ("spacing_mm", "1 × 1 × 1.25"), ("name", "x")]


def test_bytes_and_times() -> None:
    assert bytesize(812_345).replace("\u202f", " ") == "793.3 KiB"
    assert when(1_795_000_000_000) == "2026-11-18 11:06:40 UTC"
    assert when(None) == when(0) == ""
