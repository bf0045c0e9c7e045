"""Quality control beside plain loops: exact tests, sex, kinship, components and their projection."""

from __future__ import annotations

import csv
import gzip
import math
from fractions import Fraction

import numpy as np
import pytest

from permed_compute.workloads.omics import ancestry, counting, qc
from permed_compute.workloads.omics import packed as bits

from .made import genotypes, job, named, store_of, write_bed


def exact(het, hom1, hom2):
    """Hardy–Weinberg by fractions: the probability of each table with these alleles."""
    n, a = het + hom1 + hom2, 2 * min(hom1, hom2) + het
    weight = {}
    for h in range(a % 2, min(a, 2 * n - a) + 1, 2):
        r = (a - h) // 2
        weight[h] = Fraction(
            2**h * math.factorial(n), math.factorial(r) * math.factorial(h) * math.factorial(n - h - r)
        )
    total = sum(weight.values())
    return float(sum(w for w in weight.values() if w <= weight[het]) / total)


def test_hwe_is_exact():
    rows = [(0, 5, 5), (10, 0, 0), (3, 50, 1), (57, 14, 50), (1, 99, 0), (0, 0, 0), (20, 1, 1), (7, 30, 3)]
    found = counting.hwe_exact(*(np.array(column) for column in zip(*rows, strict=True)))
    assert found == pytest.approx([exact(*row) if sum(row) else 1.0 for row in rows], rel=1e-9)


def test_counts_on_sex_chromosomes():
    copies = np.array([[0, 1, 2, 2, 1, 3]] * 4, np.int8)
    sex, everybody = np.array([2, 2, 2, 1, 1, 1]), np.ones(6, bool)
    kind = counting.kind_of(["1", "X", "Y", "MT"], np.array([1, 5_000_000, 1, 1]))
    found = counting.allele_counts(bits.pack(copies), kind, sex, everybody)
    assert found.an.tolist() == [10, 7, 1, 3] and found.ac.tolist() == [6, 4, 1, 2]
    assert found.carriers.tolist() == [4, 3, 1, 2] and found.missing.tolist() == [1, 2, 2, 3]
    par = counting.kind_of(["X", "X"], np.array([20_000, 5_000_000]), "GRCh38")
    assert par.tolist() == [counting.AUTOSOME, counting.X]


def structured(variants=600, each=40, seed=1):
    """Two populations far apart, and in the first a pair of twins and a parent with a child."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.1, 0.9, (variants, 1))
    q = np.clip(p + rng.normal(0, 0.25, p.shape), 0.05, 0.95)
    one, two = rng.binomial(2, p, (variants, each)), rng.binomial(2, q, (variants, each))
    one[:, 1] = one[:, 0]
    from_parent = rng.binomial(1, one[:, 2] / 2)
    one[:, 3] = from_parent + rng.binomial(1, p[:, 0])
    return np.concatenate([one, two], axis=1).astype(np.int8)


def test_kinship_beside_a_loop_with_missing_calls():
    copies = structured(300, 10)
    copies[np.random.default_rng(2).random(copies.shape) < 0.05] = 3
    found = ancestry.king(bits.pack(copies), 20)
    for i, j in [(0, 1), (2, 3), (0, 5), (3, 17)]:
        both = (copies[:, i] < 3) & (copies[:, j] < 3)
        x, y = copies[both, i].astype(int), copies[both, j].astype(int)
        least = min((x == 1).sum(), (y == 1).sum())
        assert found.kinship[i, j] == pytest.approx(0.5 - ((x - y) ** 2).sum() / (4 * least), abs=1e-6)
        assert found.ibs0[i, j] == (abs(x - y) == 2).sum() and found.variants[i, j] == both.sum()


def test_components_are_the_exact_ones():
    copies = structured()
    found = ancestry.principal_components(bits.pack(copies), 80, 3)
    p = copies.mean(axis=1, keepdims=True) / 2
    z = (copies - 2 * p) / np.sqrt(2 * p * (1 - p))
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    assert found.eigenvalues == pytest.approx(values[::-1][:3], rel=1e-4)
    assert abs(found.scores[:, 0] @ vectors[:, -1]) > 0.999999
    assert found.change <= 1e-7


def test_projection_puts_people_where_they_were():
    copies = structured()
    found = ancestry.principal_components(bits.pack(copies), 80, 2)
    again = ancestry.project(bits.pack(copies), 80, found.frequency, found.loadings)
    assert again == pytest.approx(found.scores, abs=1e-4)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))


def test_the_job_and_its_tables(tmp_path):
    rng = np.random.default_rng(4)
    auto = structured(400, 40)
    on_x = rng.binomial(2, 0.4, (60, 80)).astype(np.int8)
    men = np.arange(80) % 2 == 0
    on_x[:, men] = 2 * rng.binomial(1, 0.4, (60, men.sum()))
    rows = [("1", 100 + k, f"a{k}", "A", "C") for k in range(400)] + [
        ("X", 5_000_000 + k, f"x{k}", "A", "C") for k in range(60)
    ]
    bed = write_bed(tmp_path / "in" / "a", np.concatenate([auto, on_x]), sex=0, rows=rows)
    fam = [f"0 p{k} 0 0 {1 if men[k] else 2} -9" for k in range(80)]
    fam[6] = "0 p6 0 0 2 -9"  # a man recorded as a woman
    bed.with_suffix(".fam").write_text("\n".join(fam) + "\n")
    made, _ = store_of(bed, tmp_path / "c")
    outcome = job("omics/qc", tmp_path / "w", [named("genotypes", made.root)], components=2)
    assert not outcome.failures and outcome.result.values["sex_disagrees"] == 1
    pruning = outcome.result.values["linkage"]
    assert 2 < pruning["kept"] < pruning["variants"] <= 400
    told = read(outcome.context.out / "samples.tsv")
    assert [row["SEX_STATUS"] for row in told].count("PROBLEM") == 1 and told[6]["SEX_STATUS"] == "PROBLEM"
    pairs = read(outcome.context.out / "kinship.kin0")
    kin = {frozenset((row["#IID1"], row["IID2"])): float(row["KINSHIP"]) for row in pairs}
    ids = made.sample_id
    assert kin[frozenset((ids[0], ids[1]))] == pytest.approx(0.5)
    assert 0.15 < kin[frozenset((ids[2], ids[3]))] < 0.35
    with gzip.open(outcome.context.out / "variants.tsv.gz", "rt") as file:
        variants = list(csv.DictReader(file, delimiter="\t"))
    assert len(variants) == 460 and int(variants[0]["ALT_CTS"]) == auto[0].sum()
    assert all((outcome.context.out / name).is_file() for name, _ in outcome.result.figures)
    assert {"kinship.png", "components.png", "maf.png"} <= {name for name, _ in outcome.result.figures}
    again = job("omics/qc", tmp_path / "w2", [named("genotypes", made.root),
                named("loadings", outcome.context.out / "loadings.tsv.gz")], kinship=False)  # fmt: skip
    vectors = [np.loadtxt(o.context.out / "components.eigenvec", skiprows=1, usecols=(1, 2)) for o in (outcome, again)]
    assert vectors[1] == pytest.approx(vectors[0], abs=1e-4)


def test_kinship_by_groups_of_people_is_the_same(tmp_path, monkeypatch):
    copies = structured(300, 30)
    copies[np.random.default_rng(2).random(copies.shape) < 0.03] = 3
    made, _ = store_of(write_bed(tmp_path / "in" / "a", copies), tmp_path / "c")
    tables = []
    for size in (100, 25):
        monkeypatch.setattr(qc, "_GROUP", size)
        outcome = job("omics/qc", tmp_path / str(size), [named("genotypes", made.root)], components=0,
                      kinship_least=0.05, call_rate=0.5)  # fmt: skip
        assert len(outcome.done) == {100: 1, 25: 6}[size]
        rows = read(outcome.context.out / "kinship.kin0")
        tables.append({frozenset((row["#IID1"], row["IID2"])): row["KINSHIP"] for row in rows})
        assert outcome.result.values["kinship"] == {"pairs": 1770, "related": len(rows), "twins_or_duplicates": 1}
    assert tables[0] == tables[1]


def test_inbreeding_and_missing_of_people():
    copies = genotypes(200, 30, missing=0.1)
    kind = np.zeros(200, np.int8)
    found = counting.allele_counts(bits.pack(copies), kind, np.zeros(30), np.ones(30, bool))
    assert (found.missing == (copies == 3).sum(axis=1)).all()
    assert (found.ref_carriers == (copies < 2).sum(axis=1)).all()
