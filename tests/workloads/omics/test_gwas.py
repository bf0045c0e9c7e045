"""Association beside NumPy and SciPy: least squares, likelihoods maximised, the saddlepoint against counting."""

from __future__ import annotations

import csv
import gzip
import itertools

import numpy as np
import pytest
from scipy import optimize, stats

from permed_compute.errors import RefusedInput
from permed_compute.testing.context import LocalContext
from permed_compute.workloads.omics import association
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.association import LinearNull, LogisticNull

from .made import genotypes, job, named, people, store_of, write_bed


def setting(samples=240, variants=60, missing=0.03, seed=0):
    rng = np.random.default_rng(seed)
    copies = genotypes(variants, samples, missing, seed)
    copies[0], copies[1] = 0, 2  # no variation
    copies[2] = 0
    copies[2, 3] = 1  # a singleton
    copies[3] = 2
    copies[3, 5:7] = 1  # REF is the rare one
    x = np.column_stack([np.ones(samples), rng.normal(size=(samples, 2)), rng.integers(0, 2, samples)])
    y = 3 + x[:, 1] + 0.4 * np.where(copies[10] == 3, 0, copies[10]) + rng.normal(size=samples)
    return copies, x, y


def minor(row, alt):
    return np.where(row == 3, np.nan, row if alt else 2.0 - row)


@pytest.mark.parametrize("missing", [0.0, 0.05])
def test_linear_is_least_squares_on_complete_cases(missing):
    copies, x, y = setting(missing=missing)
    found = association.linear(bits.pack(copies), LinearNull.of(y, x))
    assert found.error[:2].tolist() == ["CONST", "CONST"] and np.isnan(found.p[:2]).all()
    for v in range(2, len(copies)):
        g = minor(copies[v], found.a1_alt[v])
        keep = ~np.isnan(g)
        full = np.column_stack([x[keep], g[keep]])
        beta, rss, *_ = np.linalg.lstsq(full, y[keep], rcond=None)
        df = keep.sum() - full.shape[1]
        se = np.sqrt(rss[0] / df * np.linalg.inv(full.T @ full)[-1, -1])
        assert found.beta[v] == pytest.approx(beta[-1], abs=1e-5) and found.se[v] == pytest.approx(se, abs=1e-5)
        assert found.p[v] == pytest.approx(2 * stats.t.sf(abs(beta[-1] / se), df), rel=1e-4)
        assert found.people[v] == keep.sum() and np.nansum(g) <= keep.sum()


def test_a_variant_that_is_a_covariate_is_named():
    copies, x, y = setting(missing=0)
    x = np.column_stack([x, copies[10]])
    found = association.linear(bits.pack(copies), LinearNull.of(y, x))
    assert found.error[10] == "COLLINEAR" and np.isnan(found.beta[10])


def binary(seed=3):
    copies, x, _ = setting(seed=seed)
    rng = np.random.default_rng(seed)
    y = (rng.random(len(x)) < 1 / (1 + np.exp(1.5 - x[:, 1] - 0.5 * np.where(copies[10] == 3, 0, copies[10])))).astype(
        float
    )
    return copies, x, y


@pytest.mark.parametrize("test", ["wald", "firth"])
def test_logistic_maximises_the_likelihood(test):
    copies, x, y = binary()
    found = association.logistic(bits.pack(copies), LogisticNull.of(y, x), test)
    for v in (10, 11, 12, 20, 30):
        g = minor(copies[v], found.a1_alt[v])
        keep = ~np.isnan(g)
        full, outcome = np.column_stack([x[keep], g[keep]]), y[keep]

        def loss(beta, full=full, outcome=outcome):
            eta = full @ beta
            value = np.logaddexp(0, eta).sum() - outcome @ eta
            if test == "firth":
                mu = 1 / (1 + np.exp(-eta))
                value -= 0.5 * np.linalg.slogdet((full * (mu * (1 - mu))[:, None]).T @ full)[1]
            return value

        best = optimize.minimize(loss, np.zeros(full.shape[1]), method="BFGS", options={"gtol": 1e-8})
        assert found.beta[v] == pytest.approx(best.x[-1], abs=2e-4)
        mu = 1 / (1 + np.exp(-full @ best.x))
        se = np.sqrt(np.linalg.inv((full * (mu * (1 - mu))[:, None]).T @ full)[-1, -1])
        assert found.se[v] == pytest.approx(se, rel=1e-3)
    assert np.isfinite(found.p[2]) == (test == "firth")  # the singleton tells cases and controls apart


def test_score_is_the_score():
    copies, x, y = binary()
    null = LogisticNull.of(y, x)
    found = association.logistic(bits.pack(copies), null, "score")
    w = null.mu * (1 - null.mu)
    for v in range(2, 60):
        g = minor(copies[v], found.a1_alt[v])
        g = np.where(np.isnan(g), np.nanmean(g), g)
        g = g - x @ np.linalg.solve((x * w[:, None]).T @ x, (x * w[:, None]).T @ g)
        z = g @ (y - null.mu) / np.sqrt((w * g * g).sum())
        assert found.statistic[v] == pytest.approx(z, abs=1e-4)
        assert found.p[v] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-3)


def test_saddlepoint_is_nearer_to_the_truth_than_the_normal():
    """The score's distribution counted over all outcomes of twelve people, rare cases."""
    rng = np.random.default_rng(1)
    g, mu = rng.normal(size=12), rng.uniform(0.02, 0.2, 12)
    outcomes = np.array(list(itertools.product([0, 1], repeat=12)))
    chance = np.prod(np.where(outcomes == 1, mu, 1 - mu), axis=1)
    values = outcomes @ g - g @ mu
    better = 0
    for score in (1.0, 1.5, 2.0):
        true = chance[np.abs(values) >= score].sum()
        ours = association.saddlepoint(g, mu, score)
        normal = 2 * stats.norm.sf(score / np.sqrt((mu * (1 - mu) * g * g).sum()))
        better += abs(np.log(ours / true)) < abs(np.log(normal / true))
        assert abs(np.log10(ours / true)) < 0.35
    assert better == 3


def test_spa_replaces_the_normal_in_the_tail_only():
    copies, x, y = binary()
    null = LogisticNull.of(y, x)
    plain, better = (association.logistic(bits.pack(copies), null, test) for test in ("score", "spa"))
    far = np.abs(plain.statistic) > 2
    assert far.any() and (better.method[far] == "SPA").all()
    assert (better.p[~far] == plain.p[~far])[~np.isnan(plain.p[~far])].all() and (better.p[far] != plain.p[far]).all()


# ------------------------------------------------------------------------------------------------ the job


@pytest.fixture
def cohort(tmp_path):
    copies, x, y = setting(samples=120)
    made, _ = store_of(write_bed(tmp_path / "in" / "a", copies), tmp_path / "c")

    def write(values=y, covariate=x[:, 1], names=None, name="p.tsv"):
        names = names or people(120)
        rows = zip(names, values, covariate, strict=True)
        (tmp_path / name).write_text("IID\ty\tage\n" + "".join(f"{n}\t{a}\t{b}\n" for n, a, b in rows))
        return [named("genotypes", made.root), named("phenotypes", tmp_path / name)]

    return copies, x, y, write, tmp_path


def glm(outcome, name="y.glm.linear.gz"):
    with gzip.open(outcome.context.out / name, "rt") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def effects(rows):
    return np.array([float(row["BETA"].replace("NA", "nan")) for row in rows])


def test_the_job_writes_plinks_columns_and_plots(cohort):
    copies, x, y, write, tmp_path = cohort
    values = [*map(str, y)]
    values[0] = "NA"
    outcome = job("omics/gwas", tmp_path / "w", write(values), phenotype="y", covariates=["age"])
    assert not outcome.failures and outcome.result.values["people"] == 119
    rows = glm(outcome)
    assert len(rows) == 60 and rows[0]["BETA"] == "NA" and rows[0]["ERRCODE"] == "CONST"
    direct = association.linear(bits.pack(copies[:, 1:]), LinearNull.of(y[1:], x[1:, :2]))
    assert effects(rows) == pytest.approx(direct.beta, abs=1e-5, nan_ok=True)
    assert {name for name, _ in outcome.result.figures} == {"manhattan.png", "qq.png"}


def test_a_shuffled_table_gives_the_same(cohort):
    _, x, y, write, tmp_path = cohort
    order = np.random.default_rng(0).permutation(120)
    one = glm(job("omics/gwas", tmp_path / "a", write(), phenotype="y", covariates=["age"]))
    shuffled = write(y[order], x[order, 1], [people(120)[k] for k in order], "q.tsv")
    assert glm(job("omics/gwas", tmp_path / "b", shuffled, phenotype="y", covariates=["age"])) == one


def test_loco_predictions_are_subtracted(cohort):
    copies, _, y, write, tmp_path = cohort
    guess = np.random.default_rng(0).normal(size=120)
    loco = tmp_path / "p.loco"
    loco.write_text("FID_IID " + " ".join(f"0_{n}" for n in people(120)) + "\n1 " + " ".join(map(str, guess)) + "\n")
    outcome = job("omics/gwas", tmp_path / "w", [*write(), named("loco", loco)], phenotype="y")
    direct = association.linear(bits.pack(copies), LinearNull.of(y - guess, np.ones((120, 1))))
    assert effects(glm(outcome)) == pytest.approx(direct.beta, abs=1e-5, nan_ok=True)
    loco.write_text(loco.read_text().replace("\n1 ", "\n2 "))
    with pytest.raises(RefusedInput, match="LOCO_INCOMPLETE"):
        job("omics/gwas", tmp_path / "w2", [*write(), named("loco", loco)], phenotype="y")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda y, c, n: (["nan", *y[1:]], c, n), "NOT_A_NUMBER"),
        (lambda y, c, n: (["high", *y[1:]], c, n), "NOT_A_NUMBER"),
        (lambda y, c, n: (y, np.full(120, 4.0), n), "COVARIATE_CONSTANT"),
        (lambda y, c, n: (np.full(120, 4.0), c, n), "PHENOTYPE_CONSTANT"),
        (lambda y, c, n: (y, c, [f"other{k}" for k in range(120)]), "NO_OVERLAP"),
        (lambda y, c, n: (y, c, [n[0], n[0], *n[2:]]), "DUPLICATE_SAMPLES"),
        (lambda y, c, n: (["NA"] * 118 + [1, 2], c, n), "TOO_FEW_PEOPLE"),
    ],
)
def test_bad_tables_are_refused_by_row_and_pseudonym(cohort, change, code):
    _, x, y, write, tmp_path = cohort
    inputs = write(*change(list(y), x[:, 1], people(120)))
    with pytest.raises(RefusedInput) as caught:
        job("omics/gwas", tmp_path / "w", inputs, phenotype="y", covariates=["age"])
    assert caught.value.finding.code == code and "person" not in str(caught.value).replace("person ", "").replace(
        "one person", ""
    )
    if code == "NOT_A_NUMBER":
        assert "Row 2" in str(caught.value)
        assert LocalContext(tmp_path / "x", None, seed=0).pseudonym("person0")[:12] in str(caught.value)


def test_a_phenotype_that_is_not_binary_and_collinear_covariates(cohort):
    _, _, _, write, tmp_path = cohort
    with pytest.raises(RefusedInput, match="PHENOTYPE_NOT_BINARY"):
        job("omics/gwas", tmp_path / "w", write(), phenotype="y", model="logistic")
    with pytest.raises(RefusedInput, match="COVARIATES_COLLINEAR"):
        job("omics/gwas", tmp_path / "w2", write(), phenotype="y", covariates=["age", "age"])
