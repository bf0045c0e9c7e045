"""Policy files: what is wrong is named with its line and what to write instead; what changes is said in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from permed_compute.admission.policy import Policy
from permed_compute.admission.quotafile import diff, load, loads
from permed_compute.errors import Problem, SpecError

EXAMPLE = Path(__file__).resolve().parents[2] / "cluster" / "quota.yaml"
GOOD = """\
capacity: {"gpu:h100": 8, cpu: 64}
accounts:
  helse: {sector: health}
  helse/nord:
    quota: {"gpu:h100": {nominal: 4, weight: 2}}
    members: [{user: kari, bands: [clinical], purposes: [care]}]
"""


def problems(text: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        loads(text)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("  helse/nord:\n", "  helse/nord:\n    parent: hlse\n", 5, "Did you mean helse?"),
        ("helse: {sector: health}", "helse: {parent: helse/nord}", 3, "stands above itself"),
        ("nominal: 4", "nominal: 9", 5, "add up to 9 gpu:h100; there are 8 gpu:h100"),
        ("weight: 2", "weight: -2", 5, "weight -2"),
        ("nominal: 4", "nominal: -4", 5, "-4 is not an amount"),
        ('"gpu:h100": {nominal', '"gpu:h10": {nominal', 5, "Did you mean gpu:h100?"),
        ("sector: health", "sectr: health", 3, "Did you mean sector?"),
        ("accounts:", "effective: {from: 2026-05-01, until: 2026-04-01}\naccounts:", 2, "not after"),
        ("accounts:", "half_life: 7\naccounts:", 2, "not a duration"),
        ("user: kari", "role: clinican", 6, "one user or one group"),
        ("bands: [clinical]", "bands: [clincal]", 6, "Did you mean clinical?"),
        ("accounts:", "idle_charge: 0.1\naccounts:", 2, "write e.g. 10%"),
        ("accounts:", "capacity: {}\naccounts:", 2, "written twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(old: str, new: str, line: int, says: str) -> None:
    found = problems(GOOD.replace(old, new, 1))
    assert any(each.line == line and says in str(each) for each in found), list(map(str, found))


def test_all_problems_at_once() -> None:
    assert len(problems(GOOD.replace("weight: 2", "weight: -2").replace("sector", "sectr"))) == 2


def test_the_example_is_valid_and_survives_the_log() -> None:
    policy = load(EXAMPLE)
    assert Policy.from_row(policy.row()) == policy and policy.version == policy.sealed().version
    assert policy.fact("helse/sor-ost/ous/crai", "region") == "Helse Sør-Øst"
    assert {policy.fact(account.name, "sector") for account in policy.accounts} == {"health", "university"}


def test_diff_says_for_whom() -> None:
    old = loads(GOOD)
    new = loads(
        GOOD.replace("nominal: 4, weight: 2", "nominal: 2, lending_limit: 1").replace("user: kari", "user: ola")
    )
    said = diff(old, new)
    assert any("helse/nord: guaranteed less: 4 gpu:h100 → 2 gpu:h100" in line for line in said)
    assert any("lends at most without limit → 1 gpu:h100" in line for line in said)
    assert any("ola may now submit (clinical)" in line for line in said)
    assert any("kari may no longer submit" in line for line in said)
    assert diff(old, old) == []
    order = loads("short_first: 0%\nelastic_growth: false\n" + GOOD)
    assert (order.short_first, order.grows) == (0, False)
    assert diff(old, order) == [
        "everybody: short first 100% → 0%.", "everybody: running elastic jobs no longer grow.",
    ]  # fmt: skip
    assert "is not a share" in problems("short_first: soon\n" + GOOD)[0].what
