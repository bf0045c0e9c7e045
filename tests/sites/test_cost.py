"""What a job costs before it is submitted: the pages' own cases, and what Slurm says is left."""

from __future__ import annotations

from fractions import Fraction

import pytest

from permed_compute.errors import NotFoundError
from permed_compute.sites import cost
from tests.sites.cases import CASES, Case

BILLED = [case for case in CASES if case.billing is not None]


@pytest.mark.parametrize("case", BILLED, ids=lambda case: case.id)
def test_golden_rates(case: Case) -> None:
    found = cost.of(case.request)
    assert (found.rate.units, found.rate.gpu_hours) == (case.billing, case.gpu_hours)
    assert found.source.split(", read ")[0].endswith(("projects_accounting.md", "billing.md of 2024-10-15"))


def test_what_is_asked_is_reserved_and_what_is_used_is_charged() -> None:
    """Five days asked, two hours used, at 16 units."""
    case = Case("saga", "a100", {"cpus": 16, "memory": "64GiB", "gpus": 2}, more={"time_limit": "5d"})
    found = cost.of(case.request)
    assert (found.pool, found.per_hour, found.reserved, found.charged(2 * 3600)) == ("billing hour", 16, 1920, 32)


def test_olivias_gpus_are_taken_from_hours_of_their_own() -> None:
    found = cost.of(next(case for case in CASES if case.id == "olivia-accel").request)
    assert (found.pool, found.per_hour, found.reserved) == ("gpu hour", 4, 96)


def test_half_gpu_hours_stay_halves() -> None:
    case = Case("lumi", "small-g", {"cpus": 7, "memory": "65GiB", "gpus": 3})
    assert cost.of(case.request).per_hour == Fraction(3, 2)


def test_a_site_that_publishes_no_factors_is_not_guessed() -> None:
    with pytest.raises(NotFoundError, match="tsd"):
        cost.of(next(case for case in CASES if case.site == "tsd").request)


# What Slurm 22.05's `scontrol --oneliner show assoc_mgr flags=assoc,qos` prints, shortened.
SAID = """Current Association Manager state

Association Records

ClusterName=permed Account=nn9999k UserName= Partition= Priority=0 ID=3
    ParentAccount=root(1) Lft=2 DefAssoc=No
    GrpTRESMins=cpu=N(10),mem=N(0),billing=60000(1200),gres/gpu=6000(60)
    GrpTRESRunMins=cpu=N(0),mem=N(0),billing=N(600),gres/gpu=N(0)
ClusterName=permed Account=nn9999k UserName=ada(1000) Partition= Priority=0 ID=4
    GrpTRESMins=cpu=N(0),billing=60(0)
    GrpTRESRunMins=cpu=N(0),billing=N(0)
ClusterName=permed Account=nn9999 UserName= Partition= Priority=0 ID=5
    GrpTRESMins=cpu=N(0),billing=1(0)

QOS Records

QOS=normal(1)
    GrpTRESMins=cpu=N(0),billing=N(0)
QOS=nn9999k(2)
    GrpTRESMins=cpu=N(0),billing=30000(0)
    GrpTRESRunMins=cpu=N(0),billing=N(0)
"""


@pytest.mark.parametrize(
    ("account", "resource", "hours"),
    [
        ("nn9999k", "billing", 500.0),  # the QOS of the account's name is the tighter one
        ("nn9999k", "gres/gpu", (6000 - 60) / 60),
        ("nn9999", "billing", 1 / 60),
        ("normal", "billing", None),
        ("nobody", "billing", None),
    ],
)
def test_the_tightest_limit_counts_with_what_runs(account: str, resource: str, hours: float | None) -> None:
    assert cost.left_of(SAID, account, resource) == hours
