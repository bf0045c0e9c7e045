"""Scores beside a loop over people and variants, and the log that accounts for every row of a scoring file."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pytest

from permed_compute.errors import RefusedInput
from permed_compute.workloads.omics import scores

from .made import genotypes, job, named, store_of, table, write_bed, write_score

FLIP = str.maketrans("ACGT", "TGCA")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("prs")
    copies = genotypes(240, 101)
    made, _ = store_of(write_bed(root / "in" / "a", copies), root / "w", build="GRCh38")
    return copies, made, root


def naive(copies, rows, missing="mean"):
    """rows: (variant, counts REF, weight)."""
    total = np.zeros(copies.shape[1])
    for v, ref, weight in rows:
        known = copies[v][copies[v] < 3]
        mean = known.mean() if missing == "mean" else (2.0 if ref else 0.0)
        dose = np.where(copies[v] == 3, mean, copies[v])
        total += weight * (2 - dose if ref else dose)
    return total


def read(outcome, name="S1"):
    lines = [line.split("\t") for line in (outcome.context.out / f"{name}.sscore").read_text().splitlines()]
    return {column: np.array([float(row[k]) for row in lines[1:]]) for k, column in enumerate(lines[0]) if k}


def log(outcome, name="S1"):
    with gzip.open(outcome.context.out / f"{name}.match.tsv.gz", "rt") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("missing", ["mean", "zero"])
@pytest.mark.parametrize("count", [1, 12])
def test_scores_are_the_sums(cohort, tmp_path, missing, count):
    copies, made, _ = cohort
    rng, rows, files = np.random.default_rng(count), {}, []
    for k in range(count):
        chosen = rng.choice(240, 120, replace=False)
        rows[k] = [(int(v), bool(rng.random() < 0.5), float(rng.normal())) for v in chosen]
        lines = []
        for v, ref, weight in rows[k]:
            contig, position, _, r, a = table(240)[v]
            lines.append((contig, position, r if ref else a, a if ref else r, weight))
        files.append(named("score", write_score(tmp_path / f"{k}.txt", lines, f"S{k}")))
    outcome = job(
        "omics/prs", tmp_path / "w", [named("genotypes", made.root), *files], ambiguous="keep", missing=missing
    )
    assert not outcome.failures
    for k in range(count):
        found = read(outcome, f"S{k}")
        assert found[f"S{k}_SUM"] == pytest.approx(naive(copies, rows[k], missing), abs=1e-5)
        named_dose = naive(np.where(copies == 3, 0, copies), [(v, r, 1.0) for v, r, _ in rows[k]], "zero")
        lost = sum((copies[v] == 3) * 2.0 for v, ref, _ in rows[k] if ref)
        assert found["NAMED_ALLELE_DOSAGE_SUM"] == pytest.approx(named_dose - lost, abs=1e-3)
        assert (found["ALLELE_CT"] == 2 * sum(copies[v] < 3 for v, _, _ in rows[k])).all()


def test_threads_do_not_change_a_bit(cohort, tmp_path):
    _, made, _ = cohort
    file = write_score(tmp_path / "s.txt", [(c, p, a, r, 0.1 * k) for k, (c, p, _, r, a) in enumerate(table(240))])
    one, two = (
        job(
            "omics/prs",
            tmp_path / str(n),
            [named("genotypes", made.root), named("score", file)],
            threads=n,
            ambiguous="keep",
        )
        for n in (1, 2)
    )
    assert (one.context.out / "S1.sscore").read_bytes() == (two.context.out / "S1.sscore").read_bytes()


def test_every_row_has_an_end_and_planted_flips_are_recovered(cohort, tmp_path):
    copies, made, _ = cohort
    rows, wanted = [], []
    for v, (contig, position, _, ref, alt) in enumerate(table(240)[:120]):
        flip = v % 3 == 0
        effect, other = (alt.translate(FLIP), ref.translate(FLIP)) if flip else (alt, ref)
        rows.append((contig, position, effect, other, 1.0))
        if {ref, alt} in ({"A", "T"}, {"C", "G"}):
            wanted.append("ambiguous")
        else:
            wanted.append("flipped" if flip else "matched")
    rows += [
        ("2", 1000, "A", "C", 1.0),
        ("1", 1000, "A", "G", 1.0),
        ("", "", "A", "C", 1.0),
        ("1", 1010, "A", "G", "x"),
    ]
    rows += [("1", 1010, "HLA-A*24", "G", 1.0), (*rows[1][:4], 2.0)]
    wanted += ["absent", "allele_mismatch", "no_position", "bad_weight", "complex", "duplicate"]
    file = write_score(tmp_path / "s.txt", rows)
    outcome = job("omics/prs", tmp_path / "w", [named("genotypes", made.root), named("score", file)], min_match=0.5)
    told = log(outcome)
    assert [row["status"] for row in told] == wanted
    (finding,) = outcome.result.findings
    counted = {name: count for name, count in finding.numbers.items() if name != "rows"}
    assert sum(counted.values()) == len(rows) == finding.numbers["rows"]
    used = [v for v in range(120) if wanted[v] in ("matched", "flipped")]
    assert read(outcome)["S1_SUM"] == pytest.approx(naive(copies, [(v, False, 1.0) for v in used]), abs=1e-4)
    strict = job(
        "omics/prs", tmp_path / "w2", [named("genotypes", made.root), named("score", file)], min_match=0.1, flip=False
    )
    assert "flipped" not in {row["status"] for row in log(strict)}


def test_a_low_match_is_refused_with_counted_reasons_and_others_go_on(cohort, tmp_path):
    _, made, _ = cohort
    rows = [(c, p, a, r, 1.0) for c, p, _, r, a in table(60)]
    lacking = [(c, p + (5 if k % 5 < 2 else 0), e, o, w) for k, (c, p, e, o, w) in enumerate(rows)]
    files = [write_score(tmp_path / "a.txt", rows, "GOOD"), write_score(tmp_path / "b.txt", lacking, "BAD")]
    inputs = [named("genotypes", made.root), *(named("score", file) for file in files)]
    outcome = job("omics/prs", tmp_path / "w", inputs, ambiguous="keep")
    (error,) = outcome.failures.values()
    assert error.finding.code == "LOW_MATCH" and error.finding.numbers["absent"] == 24
    assert error.finding.numbers["matched"] == 36 and error.finding.numbers["rows"] == 60
    assert (outcome.context.out / "GOOD.sscore").exists() and not (outcome.context.out / "BAD.sscore").exists()
    assert len(log(outcome, "BAD")) == 60


def test_a_score_that_shares_no_variant_is_refused(cohort, tmp_path):
    _, made, _ = cohort
    file = write_score(tmp_path / "s.txt", [("9", p, a, r, 1.0) for _, p, _, r, a in table(60)])
    outcome = job("omics/prs", tmp_path / "w", [named("genotypes", made.root), named("score", file)])
    (error,) = outcome.failures.values()
    assert error.finding.code == "LOW_MATCH" and error.finding.numbers == {"rows": 60, "matched": 0, "absent": 60}


def test_another_build_is_refused(cohort, tmp_path):
    _, made, _ = cohort
    file = write_score(tmp_path / "s.txt", [(c, p, a, r, 1.0) for c, p, _, r, a in table(60)], build="GRCh37")
    with pytest.raises(RefusedInput, match="WRONG_BUILD"):
        job("omics/prs", tmp_path / "w", [named("genotypes", made.root), named("score", file)])


def test_few_people_need_frozen_frequencies(tmp_path):
    copies = genotypes(30, 9, missing=0.2)
    made, _ = store_of(write_bed(tmp_path / "in" / "a", copies), tmp_path / "c")
    file = write_score(tmp_path / "s.txt", [(c, p, a, r, 1.0) for c, p, _, r, a in table(30)])
    inputs = [named("genotypes", made.root), named("score", file)]
    with pytest.raises(RefusedInput, match="TOO_FEW_FOR_FREQUENCIES"):
        job("omics/prs", tmp_path / "w", inputs, ambiguous="keep")
    frozen = tmp_path / "ref.afreq"
    frozen.write_text("#CHROM\tID\tREF\tALT\tALT_FREQS\tOBS_CT\n" + "".join(
        f"1\t{i}\t{r}\t{a}\t0.25\t100\n" for _, _, i, r, a in table(30)))  # fmt: skip
    outcome = job("omics/prs", tmp_path / "w2", [*inputs, named("frequencies", frozen)], ambiguous="keep")
    dose = np.where(copies == 3, 0.5, copies)
    assert read(outcome)["S1_SUM"] == pytest.approx(dose.sum(axis=0), abs=1e-5)


def test_a_frozen_distribution_normalises(cohort, tmp_path):
    _, made, _ = cohort
    file = write_score(tmp_path / "s.txt", [(c, p, a, r, 1.0) for c, p, _, r, a in table(60)])
    (tmp_path / "d.json").write_text(json.dumps({"S1": {"mean": 10.0, "sd": 4.0}}))
    inputs = [named("genotypes", made.root), named("score", file), named("reference", tmp_path / "d.json")]
    found = read(job("omics/prs", tmp_path / "w", inputs, ambiguous="keep"))
    assert found["S1_Z"] == pytest.approx((found["S1_SUM"] - 10) / 4, abs=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PGS000001_hmPOS_GRCh38.txt.gz", "absent"),
        ("PGS001229_hmPOS_GRCh38.txt.gz", "absent"),
        ("complex_variants_PGS000021.txt", "complex"),
    ],
)
def test_real_files_that_do_not_fit_are_refused_with_their_reasons(tiny_store, shared_data, tmp_path, name, reason):
    file = shared_data / "omics" / name
    outcome = job("omics/prs", tmp_path, [named("genotypes", tiny_store.root), named("score", file)])
    (error,) = outcome.failures.values()
    numbers = error.finding.numbers
    assert error.finding.code == "LOW_MATCH" and numbers[reason] > 0
    rows = len(scores.read_score(file).rows)
    assert (
        numbers["rows"]
        == rows
        == sum(v for k, v in numbers.items() if k not in ("rows", "matched")) + numbers["matched"]
    )
    if "PGS000001" in name:
        assert numbers["matched"] == 0 and rows == 77


@pytest.mark.shared
def test_the_real_score_cut_to_what_is_there(tiny_store, shared_data, tmp_path):
    score = scores.read_score(shared_data / "omics" / "PGS001229_hmPOS_GRCh38.txt.gz")
    match = scores.Index(tiny_store).match(score, scores.Policy(ambiguous="keep"))
    rows = [score.rows[int(k)] for k in match.used]
    cut = [(r.contig, r.position, r.effect, r.other, r.weight) for r in rows]
    assert len(cut) > 900
    inputs = [named("genotypes", tiny_store.root), named("score", write_score(tmp_path / "cut.txt", cut))]
    outcome = job("omics/prs", tmp_path / "w", inputs, ambiguous="keep")
    assert not outcome.failures and outcome.result.values["scores"]["S1"]["variants"] == len(cut)


@pytest.mark.shared
def test_a_real_file_of_another_build_is_refused(tiny_store, shared_data, tmp_path):
    file = shared_data / "omics" / "PGS000001_hmPOS_GRCh37.txt.gz"
    with pytest.raises(RefusedInput, match="WRONG_BUILD"):
        job("omics/prs", tmp_path, [named("genotypes", tiny_store.root), named("score", file)])
