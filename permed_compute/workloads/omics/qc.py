"""Quality control of a store: variants, people, sex, relatedness, ancestry.

Round 1: one pass over every block counts alleles, missing calls and heterozygotes, of variants and of people.
Round 2: common variants that are well called are pruned by linkage, a part for every chromosome.
Round 3: kinship of all pairs out of the common variants, principal components out of the pruned ones, or the place of
these people on the components of others.

Inputs: `genotypes`; optionally `loadings`: `loadings.tsv.gz` of an earlier job, to place these people on.

`params` of the job:
    components     10      principal components; 0 = none
    tolerance      1e-7    iterate until no eigenvalue changes by more, relatively
    kinship        true    KING of all pairs
    kinship_least  0.0442  pairs at least so related are listed (third degree)
    maf            0.01    least minor allele frequency of the variants of round 2
    call_rate      0.98    least call rate of the variants of round 2
    most_variants  20000   of round 2; more are thinned evenly along the genome (not by linkage)

Results: `variants.tsv.gz`, `samples.tsv`, `kinship.kin0`, `components.eigenvec`, `loadings.tsv.gz`, pictures.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding
from permed_compute.spec import JobSpec
from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.workloads.omics import ancestry, counting, linkage, plots
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.counting import AlleleCounts
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.omics.prs import inputs_of, open_store
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result

VERSION = "2"
_GROUP = 10_000
"""People whose kinship with each other, or with as many others, is one part: 2.4 GB."""
_MOST_FOR_LINKAGE = 5_000
_PEOPLE = ("called", "het", "missing", "expected_het", "x_called", "x_het", "x_expected_het")
_TWINS = 0.354
_KINSHIPS = np.linspace(-0.5, 0.55, 106)
_MALE_F, _FEMALE_F = 0.8, 0.2
_LEAST_X = 20
"""Fewer X variants than this say nothing about sex."""


@dataclass(frozen=True, slots=True)
class Params:
    components: int = 10
    tolerance: float = 1e-7
    kinship: bool = True
    kinship_least: float = 0.0442
    maf: float = 0.01
    call_rate: float = 0.98
    most_variants: int = 20_000
    prune_r2: float = 0.2
    prune_window: int = 200

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        checked = Checked("omics/qc", given, cls)
        checked.between("components", 0, 100)
        checked.between("maf", 0, 0.5)
        checked.between("call_rate", 0, 1)
        checked.between("most_variants", 100, 1_000_000)
        checked.between("prune_r2", 0.01, 1)
        checked.between("prune_window", 2, 5000)
        return checked.done()


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    params = Params.of(spec.params)
    store = open_store(spec)
    header = tuple(ctx.digest(file) for file in store.header_files())
    if not state:
        return [
            Part(
                f"rows-{part:05d}", (*header, *(ctx.digest(file) for file in store.files(part))), {"part": part},
                (str(store.root),),
            )
            for part in range(store.layout.parts)
        ]  # fmt: skip
    everything = tuple(ctx.digest(file) for part in range(store.layout.parts) for file in store.files(part))
    if "pruned" not in state:
        given = {name: getattr(params, name) for name in ("maf", "call_rate", "prune_r2", "prune_window")}
        return [
            Part(
                f"linkage-{name}",
                (*header, *everything),
                given | {"contig": name},
                (str(store.root), *state["folders"]),
            )
            for name in state["contigs"]
        ]
    parts = []
    if params.kinship and len(state["chosen"]):
        given = {"variants": state["chosen"], "kinship": params.kinship_least}
        for one, two in combinations_with_replacement(range(-(-store.samples // _GROUP)), 2):
            groups = [[k * _GROUP, min((k + 1) * _GROUP, store.samples)] for k in (one, two)]
            name = f"kinship-{one:03d}-{two:03d}"
            parts.append(Part(name, (*header, *everything), given | {"groups": groups}, (str(store.root),)))
    loadings = inputs_of(spec, "loadings")
    if loadings:
        given = {"project": True}
        parts.append(
            Part(
                "components",
                (*header, *everything, ctx.digest(loadings[0])),
                given,
                (str(store.root), str(loadings[0])),
            )
        )
    elif params.components and len(state["pruned"]) > params.components < store.samples:
        given = {
            "variants": state["pruned"],
            "components": params.components,
            "tolerance": params.tolerance,
            "seed": spec.seed,
        }
        parts.append(Part("components", (*header, *everything), given, (str(store.root),)))
    return parts


# ------------------------------------------------------------------------------------------------ run


def run(part: Part, model: None, ctx: Context) -> PartResult:
    store = GenotypeStore(Path(part.sources[0]))
    if "part" in part.params:
        return _count(store, int(part.params["part"]), ctx)
    if "kinship" in part.params:
        return _kinship(store, part, ctx)
    if "contig" in part.params:
        return _linkage(store, part, ctx)
    return _project(store, part, ctx) if "project" in part.params else _components(store, part, ctx)


def _count(store: GenotypeStore, part: int, ctx: Context) -> PartResult:
    """One pass over the block: `counts.npz` of its variants, and sums over its variants for every person."""
    start, stop = store.layout.rows(part)
    people = np.zeros((len(_PEOPLE), store.samples))
    pieces = []
    everybody = np.ones(store.samples, bool)
    for a, b in store.chunks(start, stop):
        packed = store.packed(a, b)
        names = [store.contigs[k] for k in store.contig(a, b)]
        kind = counting.kind_of(names, store.position(a, b), store.build)
        counted = counting.allele_counts(packed, kind, store.sex, everybody)
        pieces.append(counted)
        people += _of_people(packed, kind, counted, store.samples)
    arrays: Any = AlleleCounts.joined(pieces).as_arrays()
    np.savez(ctx.out / "counts.npz", **arrays)
    np.save(ctx.out / "people.npy", people)
    return PartResult({"variants": stop - start})


def _of_people(packed: np.ndarray, kind: np.ndarray, counted: AlleleCounts, samples: int) -> np.ndarray:
    """(7, samples): see `_PEOPLE`. Expected heterozygotes by the unbiased 2pq · 2n / (2n − 1) of what is called."""
    rows = []
    for wanted in (counting.AUTOSOME, counting.X):
        where = kind == wanted
        block = packed[where]
        het, missing = bits.sample_counts(block, samples)
        p = counted.ac[where] / np.maximum(counted.an[where], 1)
        n = np.maximum(counted.an[where], 2)
        expected = 2 * p * (1 - p) * n / (n - 1)
        lost = bits.scatter(bits.split(block, samples)[1], expected[:, None], samples)[:, 0]
        rows.append((len(block) - missing, het, missing, expected.sum() - lost))
    (called, het, missing, expected), (x_called, x_het, _, x_expected) = rows
    return np.stack([called, het, missing, expected, x_called, x_het, x_expected]).astype(np.float64)


def _chosen(store: GenotypeStore, part: Part) -> np.ndarray:
    """Packed genotypes of the part's variants; a store's part at a time."""
    rows = np.asarray(part.params["variants"], np.int64)
    return take_rows(store, rows)


def take_rows(store: GenotypeStore, rows: np.ndarray, people: np.ndarray | None = None) -> np.ndarray:
    """(len(rows), bytes) packed genotypes of sorted rows, of some people or all; chunks without a wanted row are not
    read."""
    pieces = []
    for a, b in store.chunks(0, store.variants):
        inside = rows[np.searchsorted(rows, a) : np.searchsorted(rows, b)]
        if len(inside):
            block = store.packed(a, b)[inside - a]
            pieces.append(block if people is None else bits.take_samples(block, people))
    return np.concatenate(pieces)


def _linkage(store: GenotypeStore, part: Part, ctx: Context) -> PartResult:
    """`kept.npy`: rows of one chromosome that stay. Linkage is seen well enough in a few thousand people."""
    params = Params(maf=part.params["maf"], call_rate=part.params["call_rate"])
    rows = _common(store, _counts(part.sources[1:]), params)
    rows = rows[store.contig()[rows] == store.contigs.index(part.params["contig"])]
    people = np.unique(np.linspace(0, store.samples - 1, min(store.samples, _MOST_FOR_LINKAGE)).round().astype(int))
    with ctx.stage("linkage"):
        packed, window = take_rows(store, rows, people), int(part.params["prune_window"])
        stays = linkage.independent(
            packed, len(people), window=window, step=max(1, window // 4), r2=float(part.params["prune_r2"])
        )
    np.save(ctx.out / "kept.npy", rows[stays])
    return PartResult({"variants": len(rows), "kept": int(stays.sum())})


def _kinship(store: GenotypeStore, part: Part, ctx: Context) -> PartResult:
    """`kinship.kin0`: related pairs of one group of people, or between two; `seen.npy`: how many pairs by kinship."""
    (a, b), (c, d) = part.params["groups"]
    rows = np.asarray(part.params["variants"], np.int64)
    with ctx.stage("kinship"):
        first = take_rows(store, rows, np.arange(a, b))
        same = (a, b) == (c, d)
        others = None if same else take_rows(store, rows, np.arange(c, d))
        found = ancestry.king(first, b - a, others, d - c)
    least = float(part.params["kinship"])
    pairs = np.triu(np.ones(found.kinship.shape, bool), 1) if same else np.ones(found.kinship.shape, bool)
    one, two = np.nonzero(pairs & (np.nan_to_num(found.kinship, nan=-1) >= least))
    with (ctx.out / "kinship.kin0").open("w", encoding="utf-8") as file:
        for i, j in zip(one, two, strict=True):
            nsnp = max(float(found.variants[i, j]), 1.0)
            file.write(
                f"{store.sample_id[a + i]}\t{store.sample_id[c + j]}\t{int(nsnp)}\t{found.het_het[i, j] / nsnp:.6g}"
                f"\t{found.ibs0[i, j] / nsnp:.6g}\t{found.kinship[i, j]:.6g}\n"
            )
    seen, _ = np.histogram(np.clip(np.nan_to_num(found.kinship[pairs], nan=-1), _KINSHIPS[0], _KINSHIPS[-1]), _KINSHIPS)
    np.save(ctx.out / "seen.npy", seen)
    numbers = found.kinship[pairs]
    return PartResult(
        {"pairs": len(numbers), "related": len(one), "twins_or_duplicates": int(np.sum(numbers >= _TWINS))}
    )


def _related(results: Sequence[DonePart], params: Params, ctx: Context) -> dict[str, Any]:
    """One table and one picture of the groups' pairs."""
    done = sorted((item for item in results if "kinship" in item.part.params), key=lambda item: item.part.name)
    if not done:
        return {}
    with (ctx.out / "kinship.kin0").open("w", encoding="utf-8") as file:
        file.write("#IID1\tIID2\tNSNP\tHETHET\tIBS0\tKINSHIP\n")
        for item in done:
            file.write((item.folder / "kinship.kin0").read_text(encoding="utf-8"))
    seen = sum(np.load(item.folder / "seen.npy") for item in done)
    title = "kinship of all pairs (KING-robust)"
    plots.counted(seen, _KINSHIPS, ctx.out / "kinship.png", title, mark=params.kinship_least)
    return {name: sum(int(item.values[name]) for item in done) for name in done[0].values}


def _components(store: GenotypeStore, part: Part, ctx: Context) -> PartResult:
    with ctx.stage("components"):
        found = ancestry.principal_components(
            _chosen(store, part), store.samples, int(part.params["components"]),
            tolerance=float(part.params["tolerance"]), seed=int(part.params["seed"]),
        )  # fmt: skip
    _write_vectors(ctx.out / "components.eigenvec", store, found.scores)
    np.savetxt(ctx.out / "components.eigenval", found.eigenvalues, fmt="%.8g")
    _write_loadings(ctx.out / "loadings.tsv.gz", store, np.asarray(part.params["variants"]), found)
    plots.scatter(
        found.scores[:, 0], found.scores[:, 1 % found.scores.shape[1]], ctx.out / "components.png", ("PC1", "PC2")
    )
    return PartResult({"iterations": found.iterations, "change": found.change, "variants": len(found.loadings)})


def _write_vectors(path: Path, store: GenotypeStore, vectors: np.ndarray) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("#IID\t" + "\t".join(f"PC{k + 1}" for k in range(vectors.shape[1])) + "\n")
        for name, row in zip(store.sample_id, vectors, strict=True):
            file.write(f"{name}\t" + "\t".join(f"{value:.8g}" for value in row) + "\n")


def _write_loadings(path: Path, store: GenotypeStore, rows: np.ndarray, found: ancestry.Components) -> None:
    contig, position, alleles = store.contig()[rows], store.position()[rows], store.alleles()[rows]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        file.write(
            "#CHROM\tPOS\tREF\tALT\tALT_FREQS\t"
            + "\t".join(f"PC{k + 1}" for k in range(found.loadings.shape[1]))
            + "\n"
        )
        for k in range(len(rows)):
            place = (
                f"{store.contigs[contig[k]]}\t{position[k]}\t{alleles[k, 0]}\t{alleles[k, 1]}\t{found.frequency[k]:.9g}"
            )
            file.write(place + "\t" + "\t".join(f"{value:.8g}" for value in found.loadings[k]) + "\n")


def _project(store: GenotypeStore, part: Part, ctx: Context) -> PartResult:
    """Who stands where on the components of others; a variant whose REF and ALT are swapped counts the other way."""
    with gzip.open(part.sources[1], "rt", encoding="utf-8") as file:
        lines = [line.split("\t") for line in file.read().splitlines()]
    wanted = {(row[0], int(row[1]), row[2], row[3]): k for k, row in enumerate(lines[1:])}
    numbers = np.array([[float(value) for value in row[4:]] for row in lines[1:]])
    contig, position, alleles = store.contig(), store.position(), store.alleles()
    rows, given, turned = [], [], []
    for row in range(store.variants):
        place = (store.contigs[contig[row]], int(position[row]))
        straight = wanted.get((*place, alleles[row, 0], alleles[row, 1]))
        other = wanted.get((*place, alleles[row, 1], alleles[row, 0]))
        if straight is not None or other is not None:
            rows.append(row)
            given.append(straight if straight is not None else other)
            turned.append(straight is None)
    if len(rows) < len(wanted) / 2:
        raise refuse(
            "LOADINGS_ABSENT", f"{len(rows)} of the loadings' {len(wanted)} variants are in the store.",
            remedy="Half of them at least are needed.", variants=len(rows), expected=len(wanted),
        )  # fmt: skip
    used, flip = numbers[np.array(given)], np.array(turned)
    frequency = np.where(flip, 1 - used[:, 0], used[:, 0])
    loadings = np.where(flip[:, None], -used[:, 1:], used[:, 1:])
    vectors = ancestry.project(take_rows(store, np.array(rows)), store.samples, frequency, loadings)
    _write_vectors(ctx.out / "components.eigenvec", store, vectors)
    plots.scatter(vectors[:, 0], vectors[:, 1 % vectors.shape[1]], ctx.out / "components.png", ("PC1", "PC2"))
    return PartResult({"variants": len(rows), "of": len(wanted)})


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    store = open_store(ctx.spec)
    params = Params.of(ctx.spec.params)
    if not state:
        done = sorted(results, key=lambda item: item.part.name)
        if len(done) != store.layout.parts:
            raise refuse("QC_INCOMPLETE", f"{store.layout.parts - len(done)} blocks could not be counted.")
        folders = [str(item.folder) for item in done]
        common = _common(store, _counts(folders), params)
        following: dict[str, Any] = {"folders": folders, "chosen": _thinned(common, params).tolist()}
        if params.components and params.prune_r2 < 1 and len(common) and not inputs_of(ctx.spec, "loadings"):
            return Next(following | {"contigs": [store.contigs[k] for k in np.unique(store.contig()[common])]})
        return _third_round(following | {"pruned": following["chosen"]}, store, ctx)
    if "pruned" not in state:
        rows = np.sort(np.concatenate([np.load(item.folder / "kept.npy") for item in results]))
        if len(results) != len(state["contigs"]):
            raise refuse("QC_INCOMPLETE", f"{len(state['contigs']) - len(results)} chromosomes could not be pruned.")
        told = {"variants": sum(int(item.values["variants"]) for item in results), "kept": len(rows)}
        return _third_round({**state, "pruned": _thinned(rows, params).tolist(), "linkage": told}, store, ctx)
    return _tell(store, state["folders"], results, ctx, state.get("linkage"))


def _third_round(following: dict[str, Any], store: GenotypeStore, ctx: Context) -> Result | Next:
    if list(plan(ctx.spec, following, ctx)):
        return Next(following)
    return _tell(store, following["folders"], [], ctx, following.get("linkage"))


def _counts(folders: Sequence[str]) -> AlleleCounts:
    loaded = [np.load(Path(folder) / "counts.npz") for folder in folders]
    return AlleleCounts.joined([AlleleCounts(**{name: one[name] for name in AlleleCounts.__slots__}) for one in loaded])


def _common(store: GenotypeStore, counted: AlleleCounts, params: Params) -> np.ndarray:
    """Sorted rows that are autosomal, of one ALT, common, and well called."""
    p = counted.ac / np.maximum(counted.an, 1)
    kind = counting.kind_of([store.contigs[k] for k in store.contig()], store.position(), store.build)
    called = 1 - counted.missing / store.samples
    fit = (np.minimum(p, 1 - p) >= max(params.maf, 1e-9)) & (called >= params.call_rate)
    return np.flatnonzero(fit & (kind == counting.AUTOSOME) & ~store.split())


def _thinned(rows: np.ndarray, params: Params) -> np.ndarray:
    if len(rows) > params.most_variants:
        rows = rows[np.linspace(0, len(rows) - 1, params.most_variants).round().astype(int)]
    return rows


def _tell(
    store: GenotypeStore, folders: Sequence[str], results: Sequence[DonePart], ctx: Context,
    pruning: Mapping[str, int] | None,
) -> Result:  # fmt: skip
    counted = _counts(folders)
    hwe = counting.hwe_exact(counted.het, counted.hom_ref, counted.hom_alt)
    _write_variants(ctx.out / "variants.tsv.gz", store, counted, hwe)
    people = sum(np.load(Path(folder) / "people.npy") for folder in folders)
    table = _people_table(store, dict(zip(_PEOPLE, people, strict=True)))
    _write_people(ctx.out / "samples.tsv", store, table)
    p = counted.ac / np.maximum(counted.an, 1)
    plots.histogram(np.minimum(p, 1 - p), ctx.out / "maf.png", "minor allele frequency")
    plots.histogram(counted.missing / store.samples, ctx.out / "missing.png", "missing calls of a variant", log=True)
    plots.quantiles(hwe, ctx.out / "hwe.png")
    plots.scatter(table["missing"], table["f"], ctx.out / "people.png", ("missing calls", "inbreeding coefficient F"))
    figures = [
        ("people.png", "People: missing calls against heterozygosity"), ("maf.png", "Minor allele frequencies"),
        ("missing.png", "Missing calls of variants"), ("hwe.png", "Hardy–Weinberg: observed against expected p"),
    ]  # fmt: skip
    values: dict[str, Any] = {
        "samples": store.samples, "variants": store.variants,
        "call_rate": float(1 - counted.missing.sum() / max(1, store.samples * store.variants)),
        "monomorphic": int(np.sum((counted.ac == 0) | (counted.ac == counted.an))),
        "hwe_below_1e-6": int(np.sum(hwe < 1e-6)), "sex_disagrees": int(np.sum(table["sex_disagrees"])),
    }  # fmt: skip
    if pruning:
        values["linkage"] = dict(pruning)
    related = _related(results, Params.of(ctx.spec.params), ctx)
    if related:
        values["kinship"] = related
        figures.append(("kinship.png", "Kinship"))
    for item in results:
        if "kinship" in item.part.params:
            continue
        values[item.part.name] = dict(item.values)
        for file in sorted(item.folder.iterdir()):
            if file.name != "part.json":
                ctx.log_artifact(file, file.name)
            if file.suffix == ".png":
                figures.append((file.name, item.part.name.capitalize()))
    return Result(values=values, metrics={"call_rate": values["call_rate"]}, figures=figures,
                  findings=_notes(store, values))  # fmt: skip


def _people_table(store: GenotypeStore, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore", divide="ignore"):
        f = 1 - sums["het"] / sums["expected_het"]
        x_f = 1 - sums["x_het"] / sums["x_expected_het"]
        missing = sums["missing"] / (sums["missing"] + sums["called"])
        het = sums["het"] / sums["called"]
    tells = (sums["x_called"] >= _LEAST_X) & np.isfinite(x_f)
    seen = np.where(tells & (x_f > _MALE_F), 1, np.where(tells & (x_f < _FEMALE_F), 2, 0))
    disagrees = (store.sex > 0) & (seen > 0) & (seen != store.sex)
    return {"missing": missing, "het": het, "f": f, "x_f": x_f, "sex": seen, "sex_disagrees": disagrees}


def _write_people(path: Path, store: GenotypeStore, table: Mapping[str, np.ndarray]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("#IID\tF_MISS\tHET_RATE\tF\tX_F\tSEX_RECORDED\tSEX_SEEN\tSEX_STATUS\n")
        for k, name in enumerate(store.sample_id):
            status = "PROBLEM" if table["sex_disagrees"][k] else "OK" if table["sex"][k] else "UNTOLD"
            numbers = "\t".join(f"{table[column][k]:.6g}" for column in ("missing", "het", "f", "x_f"))
            file.write(f"{name}\t{numbers}\t{store.sex[k]}\t{table['sex'][k]}\t{status}\n")


def _write_variants(path: Path, store: GenotypeStore, counted: AlleleCounts, hwe: np.ndarray) -> None:
    """As plink2's .afreq, .vmiss and .hardy in one; written by the store's parts."""
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        file.write(
            "#CHROM\tPOS\tID\tREF\tALT\tALT_FREQS\tALT_CTS\tOBS_CT\tMISSING_CT\tHOM_REF_CT\tHET_CT\tHOM_ALT_CT\tP\n"
        )
        for part in range(store.layout.parts):
            start, stop = store.layout.rows(part)
            contig, position = store.contig(start, stop), store.position(start, stop)
            name, alleles = store.id(start, stop), store.alleles(start, stop)
            for k in range(stop - start):
                v = start + k
                frequency = counted.ac[v] / counted.an[v] if counted.an[v] else float("nan")
                file.write(
                    f"{store.contigs[contig[k]]}\t{position[k]}\t{name[k]}\t{alleles[k, 0]}\t{alleles[k, 1]}"
                    f"\t{frequency:.6g}\t{counted.ac[v]}\t{counted.an[v]}\t{counted.missing[v]}\t{counted.hom_ref[v]}"
                    f"\t{counted.het[v]}\t{counted.hom_alt[v]}\t{hwe[v]:.6g}\n"
                )


def _notes(store: GenotypeStore, values: Mapping[str, Any]) -> list[Finding]:
    notes = []
    if values["sex_disagrees"]:
        number = values["sex_disagrees"]
        notes.append(Finding("SEX_DISAGREES", f"{number} people have another sex on X than on record.", "note",
                             numbers={"people": number}))  # fmt: skip
    if not store.sex.any() and "X" in store.contigs:
        notes.append(Finding("SEX_UNKNOWN", "Nobody's sex is on record: on X everybody counts as a woman.", "note"))
    return notes


WORKLOAD = Map(plan=plan, run=run, reduce=reduce, version=VERSION)
