"""The register beside an attacker who has every release and knows the rules."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest

from permed_compute.errors import AuditError, RefusedInput
from permed_compute.storage.register import Register
from permed_compute.testing.context import LocalContext
from permed_compute.workloads.omics import disclosure
from permed_compute.workloads.omics.counting import AlleleCounts
from permed_compute.workloads.omics.disclosure import PRESETS, Policy, publish, withhold_differences

from .made import job, named, people, store_of, table, write_bed

TOY = Policy("toy", k=2, least_people=1, exchange=2)


def counted(carriers, size) -> AlleleCounts:
    """Everybody heterozygous or not: AC = carriers."""
    carriers = np.asarray(carriers)
    zero = np.zeros_like(carriers)
    an, everybody = np.full_like(carriers, 2 * size), np.full_like(carriers, size)
    return AlleleCounts(carriers, an, carriers, everybody, carriers, size - carriers, zero, zero)


def released(cells, size, policy=TOY):
    return publish([counted([c], size) for c in cells], [size] * len(cells), policy)


def tallied(worlds: np.ndarray) -> AlleleCounts:
    """Of (worlds, people) genotypes, 3 missing: a row for each world."""
    het, hom_ref, hom_alt, missing = ((worlds == code).sum(axis=1) for code in (1, 0, 2, 3))
    called = worlds.shape[1] - missing
    return AlleleCounts(het + 2 * hom_alt, 2 * called, het + hom_alt, het + hom_ref, het, hom_ref, hom_alt, missing)


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


@pytest.mark.parametrize("policy", [Policy("toy", k=1, least_people=1), Policy("toy", k=1, rounding=3, least_people=1)])
def test_brute_force_over_every_genotype_of_two_populations(policy):
    """Four and three people, each with none, one or two copies or missing: all worlds, grouped by what is shown."""
    worlds = np.array(list(itertools.product(range(4), repeat=7)), np.int8)
    cells = [tallied(worlds[:, :4]), tallied(worlds[:, 4:])]
    made = publish(cells, [4, 3], policy)
    _, group = np.unique(np.hstack([made.ac, made.an]), axis=0, return_inverse=True)
    for number, cell in enumerate(cells):
        hidden = made.an[:, number] < 0
        for shown in np.unique(group[hidden]):
            alike = group.reshape(-1) == shown
            for possible in (cell.carriers[alike], cell.ref_carriers[alike]):
                assert set(possible.tolist()) >= {0, 1, 2}
            assert len(set(cell.ac[alike].tolist())) > 2 and len(set(cell.an[alike].tolist())) > 2


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


@dataclass(frozen=True)
class Toy(Policy):
    few: int = 4

    def aside(self, people: int) -> int:
        return self.few


def series(policy: Policy, people: int, known: str) -> set[tuple[frozenset[str], frozenset[str]]]:
    """Every pair of counts that chance may give two releases: person 0 has left after the first, or joined."""
    everybody = frozenset(map(str, range(people)))
    first, second = (everybody, everybody - {"0"}) if known == "left" else (everybody - {"0"}, everybody)
    found = set()
    for one in {disclosure.first_count(first, policy, random.Random(seed)) for seed in range(1000)}:
        for two in {disclosure.next_count(second, one, policy, random.Random(seed)) for seed in range(200)}:
            assert two is not None and disclosure.apart(two, one, policy)
            if "0" in (one if known == "left" else two):  # the worst case: the attacker knows that they are counted
                found.add((one, two))
    return found


def attack(worlds: np.ndarray, pairs: Iterable[tuple[frozenset[str], frozenset[str]]], policy: Policy, *, rule4: bool):
    """What two releases leave possible, by what they show: person 0's genotypes after one release and after both, and
    the true counts of each withheld cell."""
    alone: dict[tuple, set[int]] = {}
    both: dict[tuple, tuple[set[int], tuple[set[int], set[int]]]] = {}
    for members in pairs:
        cells = [tallied(worlds[:, sorted(map(int, one))]) for one in members]
        made = [publish([cell], [len(one)], policy) for cell, one in zip(cells, members, strict=True)]
        if rule4:
            moved = [np.full((len(worlds), 1), 2 * len(members[a] - members[1 - a])) for a in (0, 1)]
            made[1], _ = withhold_differences(made[1], made[0], *moved, policy)
        shown = np.column_stack([made[0].ac[:, 0], made[0].an[:, 0], made[1].ac[:, 0], made[1].an[:, 0]])
        order = np.argsort((shown + 1) @ 32 ** np.arange(4), kind="stable")
        edges = np.flatnonzero(np.any(np.diff(shown[order], axis=0), axis=1)) + 1
        for alike in np.split(order, edges):
            row = tuple(shown[alike[0]].tolist())
            person = set(worlds[alike, 0].tolist())
            counted = "0" in members[0]
            alone.setdefault(row[:2] if counted else row[2:], set()).update(person)
            one, two = both.setdefault(row, (set(), (set(), set())))
            one |= person
            for place in (0, 1):
                two[place].update(cells[place].ac[alike].tolist())
    return alone, both


def gives_away(genotypes: set[int]) -> bool:
    """It is certain that the person carries the allele, or that they do not."""
    return not ({0} & genotypes and {1, 2} & genotypes)


@pytest.mark.parametrize("known", ["left", "joined"])
@pytest.mark.parametrize(("people", "aside", "codes"), [(8, 4, 3), (7, 3, 4)])
def test_two_releases_around_a_known_person_give_nothing_away(people, aside, codes, known):
    """Every world of genotypes (`codes` 4: missing calls too) and every draw of who is counted. The attacker knows who
    withdrew (or joined) and that they were counted: what the second release adds decides nothing about them, and no
    withheld count is determined."""
    policy = Toy("toy", k=1, least_people=1, exchange=2, few=aside)
    worlds = np.array(list(itertools.product(range(codes), repeat=people)), np.int8)
    worlds = worlds[worlds[:, 0] < 3]
    counted = 0 if known == "left" else 1
    alone, both = attack(worlds, series(policy, people, known), policy, rule4=True)
    assert sum(row[0] >= 0 and row[2] >= 0 for row in both) > 3
    for row, (person, cells) in both.items():
        if not gives_away(alone[row[:2] if counted == 0 else row[2:]]):
            assert not gives_away(person), row
        for place in (0, 1):
            assert row[2 * place] >= 0 or len(cells[place]) > 1, row


def test_a_release_that_people_only_left_would_give_them_away():
    """Why people are exchanged: the same attack where one withdrew and others were set aside with them. An unchanged
    count tells that none of them carries the allele."""
    policy = Policy("toy", k=1, least_people=1, exchange=2)
    worlds = np.array(list(itertools.product(range(3), repeat=7)), np.int8)
    everybody = frozenset(map(str, range(7)))
    pairs = [(everybody, everybody - {"0", *others}) for others in itertools.combinations(map(str, range(1, 7)), 2)]
    alone, both = attack(worlds, pairs, policy, rule4=False)
    unchanged = [row for row in both if row[0] == row[2] >= 0]
    assert len(unchanged) > 2
    assert all(gives_away(both[row][0]) and not gives_away(alone[row[:2]]) for row in unchanged)
    _, both = attack(worlds, pairs, policy, rule4=True)
    assert not [row for row in both if row[0] >= 0 and row[2] >= 0]  # rule 4 withholds them all: nobody came in


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


def test_who_is_counted():
    assert all(policy.exchange > policy.k for policy in PRESETS.values())
    people = frozenset(map(str, range(300)))
    first = disclosure.first_count(people, PRESETS["k5"], random.Random(1))
    assert len(first) == 280 and first < people
    gone = sorted(first)[:3]
    second = disclosure.next_count(people - set(gone), first, PRESETS["k5"], random.Random(2))
    assert not second & set(gone) and len(first - second) == 13 and len(second) == 277
    assert disclosure.apart(second, first, PRESETS["k5"]) and disclosure.apart(first, first, PRESETS["k5"])
    assert not disclosure.apart(first - {gone[0]}, first, PRESETS["k5"])
    new = people | {f"new{k}" for k in range(100)}
    assert len(disclosure.next_count(new, first, PRESETS["k5"], random.Random(3))) == 380
    assert disclosure.next_count(first, first, PRESETS["k5"], random.Random(3)) is None  # nobody to bring in


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
    copies, release, register, tmp_path = cohort
    outcome = release(1)
    (made,) = register.releases()
    rows = rows_of(made)
    ids = [LocalContext(tmp_path / "x", None, seed=0).pseudonym(name) for name in people(300)]
    members = {name: [ids.index(person) for person in counted] for name, counted in made.members.items()}
    assert [len(members[name]) for name in "ABC"] == [80] * 3 and not made.members["A"] & made.aside["A"]
    positions = [row[1] for row in table(40)]
    assert not [key for key in rows if key[0] in positions[38:]]
    for v in range(38):
        for name in "ABC":
            mine = copies[v, members[name]]
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
    assert register.verify() == 1 and register.entries()[0]["withheld"] == 0 and b"withheld" not in public
    assert (register.root.stat().st_mode & 0o777) == 0o700


def test_the_same_job_again_is_the_same_release(cohort):
    _, release, register, _ = cohort
    release(1)
    release(2)
    assert len(register.releases()) == 1 and register.verify() == 1


def test_one_withdrawal_is_refused_or_hidden_among_others(cohort):
    _, release, register, tmp_path = cohort
    release(1)
    (first,) = register.releases()
    context = LocalContext(tmp_path / "x", None, seed=0)
    counted = next(name for name in people(300) if context.pseudonym(name) in first.members["B"])
    gone = tmp_path / "withdrawn.txt"
    gone.write_text(counted + "\n")
    with pytest.raises(RefusedInput, match="DIFFERENCING"):
        release(2, named("withdrawn", gone), pad=False)
    release(3, named("withdrawn", gone))
    first, second = register.releases()
    left, joined = first.members["B"] - second.members["B"], second.members["B"] - first.members["B"]
    assert context.pseudonym(counted) in left and len(left) == 11 and len(joined) == 10
    assert context.pseudonym(counted) not in second.members["B"] | second.aside["B"]
    assert [second.members[name] for name in "AC"] == [first.members[name] for name in "AC"]
    one, two = rows_of(first), rows_of(second)
    assert {key for key in one if key[1] in "AC"} == {key for key in two if key[1] in "AC"}
    assert any(one[key]["ac"] == two[key]["ac"] for key in one.keys() & two.keys() if key[1] == "B")
    assert register.verify() == 2 and [entry["withdrawn"] for entry in register.entries()] == [False, True]
    release(4, named("withdrawn", gone))
    assert len(register.releases()) == 2  # the same again


def test_a_withdrawal_of_somebody_set_aside_changes_nothing(cohort):
    _, release, register, tmp_path = cohort
    release(1)
    (first,) = register.releases()
    context = LocalContext(tmp_path / "x", None, seed=0)
    gone = tmp_path / "withdrawn.txt"
    gone.write_text(next(name for name in people(300) if context.pseudonym(name) in first.aside["B"]))
    release(2, named("withdrawn", gone))
    assert len(register.releases()) == 1


def test_a_population_too_small_to_be_shown_may_change(cohort):
    _, release, register, tmp_path = cohort
    groups = tmp_path / "groups.tsv"
    rows = groups.read_text().splitlines()
    rows[1:91:3] = [row[:-1] + "D" for row in rows[1:91:3]]  # thirty of A
    groups.write_text("\n".join(rows) + "\n")
    release(1)
    (first,) = register.releases()
    context = LocalContext(tmp_path / "x", None, seed=0)
    gone = tmp_path / "withdrawn.txt"
    gone.write_text(next(name for name in people(300) if context.pseudonym(name) in first.members["D"]))
    release(2, named("withdrawn", gone))
    first, second = register.releases()
    assert not [key for one in (first, second) for key in rows_of(one) if key[1] in ("D", "TOTAL")]
    assert [first.members[name] for name in "ABC"] == [second.members[name] for name in "ABC"]


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
