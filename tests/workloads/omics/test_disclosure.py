"""The register beside an attacker who has every release and knows the rules."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from permed_compute.errors import AuditError, RefusedInput
from permed_compute.storage.register import Register
from permed_compute.workloads.omics import disclosure
from permed_compute.workloads.omics.counting import AlleleCounts
from permed_compute.workloads.omics.disclosure import PRESETS, Policy, publish, withhold_differences

from .made import job, named, people, store_of, table, write_bed

TOY = Policy("toy", k=2, least_people=1, least_change=4)


def counted(carriers, size) -> AlleleCounts:
    """Everybody heterozygous or not: AC = carriers."""
    carriers = np.asarray(carriers)
    zero = np.zeros_like(carriers)
    an, everybody = np.full_like(carriers, 2 * size), np.full_like(carriers, size)
    return AlleleCounts(carriers, an, carriers, everybody, carriers, size - carriers, zero, zero)


def released(cells, size, policy=TOY):
    return publish([counted([c], size) for c in cells], [size] * len(cells), policy)


@pytest.mark.parametrize("policy", [TOY, Policy("toy-rounded", k=2, rounding=3, least_people=1)])
def test_brute_force_recovers_no_withheld_cell(policy):
    """For every table of three populations: all tables that would have been published alike. A withheld cell must still
    be able to have every value from 0 to k."""
    size = 8
    views: dict[bytes, list[tuple[int, ...]]] = {}
    for cells in itertools.product(range(size + 1), repeat=3):
        made = released(cells, size, policy)
        views.setdefault(made.ac.tobytes() + made.an.tobytes(), []).append(cells)
    for alike in views.values():
        shown = released(alike[0], size, policy).an[0, :3] >= 0
        for population in np.flatnonzero(~shown):
            possible = {cells[population] for cells in alike}
            assert possible >= set(range(policy.k + 1)), (alike[0], population)


def test_withholding_a_second_cell_with_the_total_shown_would_leak():
    """Why rule 3 takes the total instead: the textbook's complementary suppression, broken by the same attack."""
    size, k = 8, 2

    def textbook(cells):
        shown = [c if c > k else -1 for c in cells]
        if shown.count(-1) == 1 and max(shown) > 0:
            shown[shown.index(min(c for c in shown if c >= 0))] = -1
        return (*shown, sum(cells))

    views: dict[tuple, list] = {}
    for cells in itertools.product(range(size + 1), repeat=3):
        views.setdefault(textbook(cells), []).append(cells)
    narrowed = [
        alike for shown, alike in views.items() for p in range(3)
        if shown[p] < 0 and any(c[p] <= k for c in alike) and len({c[p] for c in alike}) == 1
    ]  # fmt: skip
    assert narrowed


def test_two_releases_do_not_tell_who_left():
    """Cells before and after some left: what both show never differs by what few people carry."""
    for before, after in itertools.product(range(9), repeat=2):
        old, new = released([before, 8], 8), released([after, 8], 8)
        new, _ = withhold_differences(new, old, TOY)
        if new.an[0, 0] >= 0 and old.an[0, 0] >= 0:
            moved = abs(int(new.ac[0, 0] - old.ac[0, 0]))
            assert moved == 0 or moved > 2 * TOY.k
        if (new.an[0, :2] < 0).any():
            assert new.an[0, 2] < 0


def test_sums_are_right_where_all_is_shown():
    rng = np.random.default_rng(0)
    cells = [counted(rng.integers(0, 200, 500), 200) for _ in range(4)]
    made = publish(cells, [200] * 4, PRESETS["k5"])
    whole = made.an[:, -1] >= 0
    assert whole.any() and not whole.all()
    assert (made.ac[whole, -1] == made.ac[whole, :-1].sum(axis=1)).all()
    assert (made.an[whole, -1] == made.an[whole, :-1].sum(axis=1)).all()
    assert ((made.an[~whole, :-1] < 0).any(axis=1)).all()


def test_presets_and_small_populations():
    sizes = [200, 40]
    made = publish([counted([6, 7, 8, 11, 0, 198], 200), counted([20] * 6, 40)], sizes, PRESETS["k5"])
    assert made.ac[:, 0].tolist() == [6, 7, 8, 11, -1, 198] and (made.ac[:, 1] == -1).all()
    rounded = publish([counted([7, 8, 13], 200)], [200], PRESETS["k7-rounded"])
    assert rounded.ac[:, 0].tolist() == [-1, 10, 15] and rounded.an[1, 0] == 400
    assert publish([counted([10, 11], 200)], [200], PRESETS["k10"]).ac[:, 0].tolist() == [-1, 11]


def test_few_changes_are_found():
    before = {"a": frozenset("abcdefgh"), "b": frozenset("xyz")}
    assert disclosure.changes_allowed(before, before, TOY) == []
    assert disclosure.changes_allowed(before | {"a": frozenset("abcdefg")}, before, TOY) == ["a", "all"]
    assert disclosure.changes_allowed(before | {"a": frozenset("abcd")}, before, TOY) == []


# ------------------------------------------------------------------------------------------------ the job


@pytest.fixture
def cohort(tmp_path):
    rng = np.random.default_rng(5)
    frequency = np.r_[rng.uniform(0.05, 0.5, 38), 0.0, 0.0]
    copies = rng.binomial(2, frequency[:, None], size=(40, 300)).astype(np.int8)
    copies[38, 7] = 1  # a planted singleton
    copies[39, :4] = 1  # four carriers, all in one population
    made, _ = store_of(write_bed(tmp_path / "in" / "a", copies), tmp_path / "c")
    groups = tmp_path / "groups.tsv"
    names = people(300)
    groups.write_text("IID\tPOPULATION\n" + "".join(f"{n}\t{'ABC'[k % 3]}\n" for k, n in enumerate(names)))
    inputs = [named("genotypes", made.root), named("populations", groups)]

    def release(number, *more, **params):
        params = {"register": str(tmp_path / "register")} | params
        return job("omics/frequency", tmp_path / f"r{number}", [*inputs, *more], **params)

    return copies, release, Register(tmp_path / "register"), tmp_path


def rows_of(release):
    return {(r["pos"], r["population"]): r for r in pq.read_table(release.table).to_pylist()}


def test_a_release_its_sums_and_the_singleton(cohort):
    copies, release, register, _ = cohort
    outcome = release(1)
    (made,) = register.releases()
    rows = rows_of(made)
    positions = [row[1] for row in table(40)]
    assert not [key for key in rows if key[0] in positions[38:]]
    for v in range(38):
        for number, name in enumerate("ABC"):
            mine = copies[v, number::3]
            shown = rows.get((positions[v], name))
            if (mine > 0).sum() > 5 and (mine < 2).sum() > 5:
                assert (shown["ac"], shown["an"]) == (mine.sum(), 2 * len(mine))
                assert shown["af"] == pytest.approx(mine.mean() / 2)
            else:
                assert shown is None
    with gzip.open(made.folder / "public" / "beacon.jsonl.gz") as file:
        entries = [json.loads(line) for line in file]
    assert len(entries) == outcome.result.values["variants"] == len({key[0] for key in rows})
    told = {f["population"]: f for f in entries[0]["frequencyInPopulations"][0]["frequencies"]}
    assert told["A"]["alleleCount"] == rows[(positions[0], "A")]["ac"]
    public = b"".join(file.read_bytes() for file in (made.folder / "public").iterdir())
    assert not any(member.encode() in public for member in made.members["A"])
    assert register.verify() == 1
    assert (register.root.stat().st_mode & 0o777) == 0o700


def test_the_same_job_again_is_the_same_release(cohort):
    _, release, register, _ = cohort
    release(1)
    release(2)
    assert len(register.releases()) == 1 and register.verify() == 1


def test_one_withdrawal_is_refused_or_hidden_among_others(cohort):
    _, release, register, tmp_path = cohort
    release(1)
    gone = tmp_path / "withdrawn.txt"
    gone.write_text("person7\n")
    with pytest.raises(RefusedInput, match="DIFFERENCING"):
        release(2, named("withdrawn", gone), pad=False)
    release(3, named("withdrawn", gone))
    first, second = register.releases()
    left = first.members["B"] - second.members["B"]
    assert len(left) == PRESETS["k5"].least_change and not second.members["B"] - first.members["B"]
    one, two = rows_of(first), rows_of(second)
    for key in one.keys() & two.keys():
        for count in (lambda r: r["ac"], lambda r: r["an"] - r["ac"]):
            moved = abs(count(one[key]) - count(two[key]))
            assert moved == 0 or moved > 10 or key[1] == "TOTAL", key
    assert register.verify() == 2 and [entry["withdrawn"] for entry in register.entries()] == [False, True]


def test_another_policy_is_refused(cohort):
    _, release, _, _ = cohort
    release(1)
    with pytest.raises(RefusedInput, match="under policy k5"):
        release(2, policy="k10")


def test_an_edited_table_and_a_cut_log_are_found(cohort):
    _, release, register, _ = cohort
    release(1)
    (made,) = register.releases()
    entry = (register.root / "audit.jsonl").read_text()
    made.table.chmod(0o600)
    made.table.write_bytes(made.table.read_bytes() + b"x")
    with pytest.raises(AuditError, match="not what was released"):
        register.verify()
    (register.root / "audit.jsonl").write_text(entry.replace('"before": ""', '"before": "f"'))
    with pytest.raises(AuditError, match="does not follow"):
        register.verify()
