"""Beside plink2: the same numbers by every route into the store."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import numpy as np
import pytest

from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.workloads.omics import linkage, scores
from permed_compute.workloads.omics import packed as bits

from .made import job, named, store_of, write_score

pytestmark = pytest.mark.plink2


def run(program: str, folder: Path, *words: object) -> None:
    done = subprocess.run([program, "--threads", "1", *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr[-300:]


def read(path: Path, key: str = "ID") -> dict[str, dict[str, str]]:
    text = (gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()).splitlines()
    header = [name.lstrip("#") for name in text[0].split()]
    rows = [dict(zip(header, line.split(), strict=True)) for line in text[1:]]
    return {row[key]: row for row in rows}


def column(rows: list[dict[str, str]], *names: str) -> np.ndarray:
    name = next(name for name in names if name in rows[0])
    return np.array([float(row[name].replace("NA", "nan")) for row in rows])


@pytest.fixture(scope="module")
def dummy(plink2, tmp_path_factory):
    """400 people × 1,200 variants of plink2's own making, 2 % missing, in four formats; and the four stores."""
    root = tmp_path_factory.mktemp("dummy")
    run(plink2, root, "--dummy", 400, 1200, 0.02, "acgt", "--seed", 3, "--make-pgen", "--out", "d")
    run(plink2, root, "--pfile", "d", "--make-bed", "--out", "d")
    run(plink2, root, "--pfile", "d", "--export", "vcf", "bgz", "--out", "d")
    run(plink2, root, "--pfile", "d", "--export", "bgen-1.2", "bits=8", "ref-first", "--out", "d")
    stores = {end: store_of(root / f"d.{end}", root / end)[0] for end in ("pgen", "bed", "vcf.gz", "bgen")}
    return root, stores


@pytest.fixture(scope="module")
def linked(plink2, tmp_path_factory):
    """600 people with linkage, by msprime: most variants are rare; 1 % missing; two phenotypes and covariates."""
    import msprime

    root = tmp_path_factory.mktemp("linked")
    trees = msprime.sim_ancestry(
        600, sequence_length=400_000, recombination_rate=1e-8, population_size=10_000, random_seed=1
    )
    trees = msprime.sim_mutations(trees, rate=1e-8, random_seed=2)
    rng, seen = np.random.default_rng(0), set()
    lines = []
    for line in trees.as_vcf(contig_id="1", position_transform=lambda x: np.asarray(x).astype(int) + 1).splitlines():
        cells = line.split("\t")
        if line.startswith("#") or ("," not in cells[4] and cells[1] not in seen):
            if not line.startswith("#"):
                seen.add(cells[1])
                calls = np.array(cells[9:], object)
                calls[rng.random(len(calls)) < 0.01] = "./."
                line = "\t".join([*cells[:2], f"v{cells[1]}", *cells[3:9], *calls])
            lines.append(line)
    (root / "m.vcf").write_text("\n".join(lines) + "\n")
    run(plink2, root, "--vcf", "m.vcf", "--make-pgen", "--out", "m")
    names = next(line for line in lines if line.startswith("#CHROM")).split("\t")[9:]
    x = rng.normal(size=(600, 3))
    y = 5 + x @ [0.3, 0.2, 0] + rng.normal(size=600)
    case = 1 + (rng.random(600) < 1 / (1 + np.exp(1.5 - 0.5 * x[:, 0])))
    table = [f"{n} {'NA' if k % 97 == 0 else y[k]} {case[k]} " + " ".join(map(str, x[k])) for k, n in enumerate(names)]
    (root / "p.txt").write_text("#IID y b c0 c1 c2\n" + "\n".join(table) + "\n")
    return root, store_of(root / "m.pgen", root / "c")[0]


def test_counts_by_every_route(plink2, dummy):
    root, stores = dummy
    run(plink2, root, "--pfile", "d", "--geno-counts", "--out", "d")
    theirs = read(root / "d.gcount")
    for end, made in stores.items():
        ours = bits.counts(made.packed(0, made.variants), made.samples)
        rows = [theirs[str(name)] for name in made.id()]
        wanted = np.stack(
            [column(rows, k) for k in ("HOM_REF_CT", "HET_REF_ALT_CTS", "TWO_ALT_GENO_CTS", "MISSING_CT")], axis=1
        )
        straight = made.alleles()[:, 1] == np.array([row["ALT"] for row in rows], object)
        assert straight.all(), end
        assert (ours == wanted).all(), end


def test_hwe(plink2, dummy, tmp_path):
    root, stores = dummy
    run(plink2, root, "--pfile", "d", "--hardy", "--out", "d")
    theirs = read(root / "d.hardy")
    outcome = job("omics/qc", tmp_path, [named("genotypes", stores["bed"].root)], components=0, kinship=False)
    ours = read(outcome.context.out / "variants.tsv.gz")
    pairs = np.array([(float(ours[name]["P"]), float(row["P"])) for name, row in theirs.items()])
    assert np.abs(np.diff(np.log10(pairs), axis=1)).max() < 1e-4


def test_counts_and_hwe_of_simulated_people(plink2, linked, tmp_path):
    root, made = linked
    run(plink2, root, "--pfile", "m", "--geno-counts", "--hardy", "--out", "m")
    same_counts(read(root / "m.gcount"), read(root / "m.hardy"), made, tmp_path)


@pytest.mark.shared
def test_counts_hwe_and_a_catalog_score_of_real_people(plink2, tiny_store, shared_data, tmp_path):
    """`tiny1000G`, autosomes, and `PGS001229` cut to the variants that are there."""
    run(plink2, tmp_path, "--vcf", shared_data / "omics" / "tiny1000G.vcf.gz", "--sort-vars", "--chr", "1-22",
        "--set-all-var-ids", "@:#:$r:$a", "--new-id-max-allele-len", 300, "--make-pgen", "--out", "t")  # fmt: skip
    run(plink2, tmp_path, "--pfile", "t", "--geno-counts", "--hardy", "--out", "t")
    made, _ = store_of(tmp_path / "t.pgen", tmp_path / "c", build="GRCh38")
    same_counts(read(tmp_path / "t.gcount"), read(tmp_path / "t.hardy"), made, tmp_path / "q")
    score = scores.read_score(shared_data / "omics" / "PGS001229_hmPOS_GRCh38.txt.gz")
    match = scores.Index(tiny_store).match(score, scores.Policy(ambiguous="keep"))
    kept = [k for k in match.used.tolist() if score.rows[k].contig.isdigit()]
    rows = [(r.contig, r.position, r.effect, r.other, repr(r.weight)) for r in (score.rows[k] for k in kept)]
    assert len(rows) > 900
    alleles, names = tiny_store.alleles(), []
    for k in kept:
        ref, alt = alleles[match.store_row[k]]
        effect = ref if match.counts_ref[k] else alt
        row = score.rows[k]
        names.append(f"{row.contig}:{row.position}:{ref}:{alt} {effect} {row.weight!r}")
    (tmp_path / "w.txt").write_text("ID A s\n" + "\n".join(names) + "\n")
    run(plink2, tmp_path, "--pfile", "t", "--score", "w.txt", 1, 2, 3, "header-read", "cols=+scoresums", "--out", "s")
    theirs = list(read(tmp_path / "s.sscore", "IID").values())
    file = write_score(tmp_path / "cut.txt", rows)
    outcome = job("omics/prs", tmp_path / "p", [named("genotypes", tiny_store.root), named("score", file)],
                  ambiguous="keep")  # fmt: skip
    ours = list(read(outcome.context.out / "S1.sscore", "IID").values())
    assert len(ours) == 3202
    assert np.abs(column(ours, "S1_SUM") - column(theirs, "s_SUM", "SCORE1_SUM")).max() <= 1e-5


def same_counts(counted: dict, hardy: dict, made: GenotypeStore, place: Path) -> None:
    outcome = job("omics/qc", place, [named("genotypes", made.root)], components=0, kinship=False)
    ours = read(outcome.context.out / "variants.tsv.gz")
    assert set(ours) == set(counted) and len(ours) > 300
    for name, row in counted.items():
        wanted = (row["HOM_REF_CT"], row["HET_REF_ALT_CTS"], row["TWO_ALT_GENO_CTS"], row["MISSING_CT"])
        mine = ours[name]
        assert (mine["HOM_REF_CT"], mine["HET_CT"], mine["HOM_ALT_CT"], mine["MISSING_CT"]) == wanted
    pairs = np.array([(float(ours[name]["P"]), float(row["P"])) for name, row in hardy.items()])
    assert np.abs(np.diff(np.log10(np.maximum(pairs, 1e-300)), axis=1)).max() < 1e-4


@pytest.mark.parametrize("count", [1, 12])
def test_scores_by_every_route(plink2, dummy, tmp_path, count):
    root, stores = dummy
    rng = np.random.default_rng(count)
    rows = list(read(root / "d.pvar").values())
    chosen = rng.choice(len(rows), 700, replace=False)
    effect, weights = rng.random(700) < 0.5, rng.normal(scale=0.02, size=(700, count))
    names = [f"s{k}" for k in range(count)]
    lines = [f"{rows[v]['ID']} {rows[v]['REF'] if e else rows[v]['ALT']} " + " ".join(map(repr, map(float, w)))
             for v, e, w in zip(chosen, effect, weights, strict=True)]  # fmt: skip
    (tmp_path / "w.txt").write_text("ID A " + " ".join(names) + "\n" + "\n".join(lines) + "\n")
    columns = f"3-{2 + count}" if count > 1 else "3"
    run(plink2, tmp_path, "--pfile", root / "d", "--score", "w.txt", 1, 2, "header-read", "cols=+scoresums",
        "--score-col-nums", columns, "--out", "s")  # fmt: skip
    theirs = list(read(tmp_path / "s.sscore", "IID").values())
    files = []
    for k, name in enumerate(names):
        given = []
        for v, e, w in zip(chosen, effect, weights[:, k], strict=True):
            row = rows[v]
            one, two = (row["REF"], row["ALT"]) if e else (row["ALT"], row["REF"])
            given.append((row["CHROM"], row["POS"], one, two, repr(float(w))))
        files.append(named("score", write_score(tmp_path / f"{name}.txt", given, name)))
    for end, made in stores.items():
        outcome = job("omics/prs", tmp_path / end, [named("genotypes", made.root), *files], ambiguous="keep")
        for name in names:
            ours = list(read(outcome.context.out / f"{name}.sscore", "IID").values())
            assert np.abs(column(ours, f"{name}_SUM") - column(theirs, f"{name}_SUM")).max() <= 1e-5
            assert np.abs(column(ours, f"{name}_AVG") - column(theirs, f"{name}_AVG")).max() <= 1e-7
            for same in ("ALLELE_CT", "NAMED_ALLELE_DOSAGE_SUM"):
                assert column(ours, same) == pytest.approx(column(theirs, same), abs=2e-2 if end == "bgen" else 1e-3)


def test_linear_also_on_rare_variants(plink2, linked, tmp_path):
    root, made = linked
    run(plink2, root, "--pfile", "m", "--glm", "hide-covar", "cols=+a1freq", "--covar", "p.txt",
        "--covar-name", "c0-c2", "--pheno", "p.txt", "--pheno-name", "y", "--out", "g")  # fmt: skip
    ours, theirs = associated(made, root, tmp_path, "y", "linear"), read(root / "g.y.glm.linear")
    frequency, beta, se, p = compared(ours, theirs)
    assert (frequency < 0.005).sum() > 100
    assert beta.max() <= 1e-5 and se.max() <= 1e-5 and p.max() <= 1e-4


def associated(made: GenotypeStore, root: Path, place: Path, phenotype: str, model: str, **more: object):
    inputs = [named("genotypes", made.root), named("phenotypes", root / "p.txt")]
    outcome = job(
        "omics/gwas", place / model, inputs, phenotype=phenotype, model=model, covariates=["c0", "c1", "c2"], **more
    )
    assert not outcome.failures
    return read(next(outcome.context.out.glob("*.gz")))


def compared(ours, theirs):
    """(A1 frequency, |Δβ| relative above 1, |ΔSE| likewise, |Δ log10 p|) where plink2 has a value: we have one too."""
    rows = [(ours[name], row) for name, row in theirs.items() if "NA" not in (row.get("BETA"), row.get("OR"))]
    a, b = [one for one, _ in rows], [two for _, two in rows]
    sign = np.array([1 if one["A1"] == two["A1"] else -1 for one, two in rows])
    effect, error = column(b, "BETA"), column(b, "SE", "LOG(OR)_SE")
    beta = np.abs(sign * column(a, "BETA") - effect) / np.maximum(1, np.abs(effect))
    se = np.abs(column(a, "SE") - error) / np.maximum(1, error)
    return column(a, "A1_FREQ"), beta, se, np.abs(np.log10(column(a, "P")) - np.log10(column(b, "P")))


@pytest.mark.parametrize(("test", "words", "end"), [("wald", ["no-firth"], "logistic"), ("firth", ["firth"], "firth")])
def test_logistic(plink2, linked, tmp_path, test, words, end):
    root, made = linked
    run(plink2, root, "--pfile", "m", "--glm", "hide-covar", *words, "cols=+a1freq,+beta", "--covar", "p.txt",
        "--covar-name", "c0-c2", "--pheno", "p.txt", "--pheno-name", "b", "--out", test)  # fmt: skip
    theirs = read(next(root.glob(f"{test}.b.glm.{end}*")))
    ours = associated(made, root, tmp_path, "b", "logistic", test=test)
    _, beta, se, p = compared(ours, theirs)
    assert len(p) > 300 and p.max() <= 0.02 and np.nanmax(beta) <= 0.01 and np.nanmax(se) <= 0.01


@pytest.mark.parametrize(("window", "step", "r2"), [(50, 5, 0.5), (100, 100, 0.1), (300, 10, 0.8)])
def test_pruning_by_linkage_keeps_the_same_variants(plink2, linked, window, step, r2):
    root, made = linked
    run(plink2, root, "--pfile", "m", "--indep-pairwise", window, step, r2, "--out", "m")
    stays = linkage.independent(made.packed(0, made.variants), made.samples, window=window, step=step, r2=r2)
    kept = {str(name) for name in made.id()[stays]}
    assert 50 < len(kept) < made.variants and kept == set((root / "m.prune.in").read_text().split())


@pytest.mark.shared
def test_components_and_kinship_of_real_people(plink2, shared_data, tmp_path):
    run(plink2, tmp_path, "--vcf", shared_data / "omics" / "tiny1000G.vcf.gz", "--sort-vars", "--chr", "1-22",
        "--thin-indiv-count", 800, "--seed", 1, "--make-pgen", "--out", "t")  # fmt: skip
    run(plink2, tmp_path, "--pfile", "t", "--pca", 3, "--make-king-table", "--king-table-filter", 0.1, "--out", "t")
    made, _ = store_of(tmp_path / "t.pgen", tmp_path / "c")
    params = {"maf": 0.0, "call_rate": 0.0, "components": 3, "kinship_least": 0.1, "prune_r2": 1.0}
    outcome = job("omics/qc", tmp_path / "w", [named("genotypes", made.root)], **params)
    vectors = [
        np.loadtxt(path, skiprows=1, usecols=(1, 2, 3))
        for path in (outcome.context.out / "components.eigenvec", tmp_path / "t.eigenvec")
    ]
    for k in range(3):  # separated: the fourth eigenvalue is far below
        assert abs(np.corrcoef(vectors[0][:, k], vectors[1][:, k])[0, 1]) >= 0.999
    tables = outcome.context.out / "kinship.kin0", tmp_path / "t.kin0"
    ours, theirs = (np.sort(np.loadtxt(path, skiprows=1, usecols=5)) for path in tables)
    assert len(ours) == len(theirs) > 50 and np.abs(ours - theirs).max() < 1e-5


@pytest.mark.shared
def test_bgen_and_vcf_of_the_same_people(tiny_store, shared_data, tmp_path):
    made, _ = store_of(shared_data / "omics" / "tiny1000G.bgen", tmp_path, bgen_ref="last")
    assert (made.alleles() == tiny_store.alleles()).all()
    # On X this BGEN has the last person otherwise than the VCF has (plink2 reads it as we do).
    rows = np.flatnonzero(made.contig() != made.contigs.index("X"))
    counted = [bits.counts(s.packed(0, s.variants)[rows], s.samples) for s in (made, tiny_store)]
    assert len(rows) == 968 and (counted[0] == counted[1]).all()
