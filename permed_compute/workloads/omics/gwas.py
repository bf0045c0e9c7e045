"""Genome-wide association: every variant of a store against one phenotype, a part for every block of variants.

Inputs: `genotypes`; `phenotypes` (a table with a column IID; covariates may stand in it too); optionally `covariates`
(another table) and `loco` (regenie's leave-one-chromosome-out predictions).

`params` of the job:
    phenotype     the column
    covariates    []       their columns; a constant is always added
    model         linear   linear, or logistic (the phenotype is 0/1 or plink's 1/2)
    test          spa      logistic only: score, spa (score, with the saddlepoint where |z| > 2), wald, firth

Results: `<phenotype>.glm.<model>.gz` with plink2's columns (A1 is the minor allele and may be REF), Manhattan and QQ
plots, the genomic inflation factor.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from permed_compute.spec import JobSpec
from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.workloads.omics import association, phenotypes, plots
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.association import LinearNull, LogisticNull, Tested
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.omics.prs import inputs_of, open_store
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "2"
_MEDIAN_CHI2 = 0.4549364231195724


@dataclass(frozen=True, slots=True)
class Params:
    phenotype: str = ""
    covariates: tuple[str, ...] = ()
    model: str = "linear"
    test: str = "spa"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        checked = Checked("omics/gwas", given, cls)
        checked.one_of("model", "linear", "logistic")
        checked.one_of("test", "score", "spa", "wald", "firth")
        if not given.get("phenotype"):
            checked.problem("phenotype", "is missing.", "Write the name of its column.")
        return checked.done()


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    params = Params.of(spec.params)
    store = open_store(spec)
    load_model(spec, ctx)  # what is wrong with the tables is said before anything is computed
    given = {"phenotype": params.phenotype, "covariates": list(params.covariates), "model": params.model}
    given |= {"test": params.test} if params.model == "logistic" else {}
    tables = [ctx.digest(file) for name in ("phenotypes", "covariates", "loco") for file in inputs_of(spec, name)]
    header = [ctx.digest(file) for file in store.header_files()]
    return [
        Part(
            f"rows-{part:05d}", (*header, *(ctx.digest(file) for file in store.files(part)), *tables),
            given | {"part": part}, (str(store.root),),
        )
        for part in range(store.layout.parts)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Analysis:
    """Who is analysed, and the null model of each contig ('' = of every contig that has no own LOCO prediction)."""

    store: GenotypeStore
    people: np.ndarray
    """Indices into the store's samples."""
    nulls: Mapping[str, LinearNull | LogisticNull]
    test: str

    def null(self, contig: str) -> LinearNull | LogisticNull:
        return self.nulls[contig if contig in self.nulls else ""]


def load_model(spec: JobSpec, ctx: Context) -> Analysis:
    """Raises `RefusedInput` with what is wrong in the tables, by row and pseudonym."""
    params = Params.of(spec.params)
    store = open_store(spec)
    files = inputs_of(spec, "phenotypes")
    if not files:
        raise refuse("TABLE_UNREADABLE", "The job names no input `phenotypes`.")
    tables = [phenotypes.read_people(file, store, ctx.pseudonym) for file in (*files, *inputs_of(spec, "covariates"))]
    y = phenotypes.numbers(tables[0], params.phenotype, store)
    columns = []
    for name in params.covariates:
        table = next((table for table in tables if name in table.columns), tables[-1])
        columns.append((name, phenotypes.numbers(table, name, store)))
    loco: dict[str, np.ndarray] = {}
    for file in inputs_of(spec, "loco"):
        loco = phenotypes.read_loco(file, store, ctx.pseudonym)
        absent = [name for name in store.contigs if name not in loco]
        if absent:
            raise refuse(
                "LOCO_INCOMPLETE", f"The LOCO file has no line for chromosome {absent[0]}.", chromosomes=len(absent)
            )
    whole = np.isfinite(y)
    for _, values in columns:
        whole &= np.isfinite(values)
    for values in loco.values():
        whole &= np.isfinite(values)
    least = len(columns) + 3
    if whole.sum() < least:
        raise refuse(
            "TOO_FEW_PEOPLE", f"{whole.sum()} people have all columns; {least} are needed.", people=int(whole.sum())
        )
    x = phenotypes.design(columns, whole)
    if params.model == "linear":
        return _linear(store, y, x, whole, loco)
    return _logistic(store, y, x, whole, loco, params.test)


def _linear(
    store: GenotypeStore, y: np.ndarray, x: np.ndarray, whole: np.ndarray, loco: Mapping[str, np.ndarray]
) -> Analysis:
    if np.ptp(y[whole]) == 0:
        raise refuse("PHENOTYPE_CONSTANT", "The phenotype is the same in everybody.")
    nulls: dict[str, LinearNull | LogisticNull]
    nulls = {name: LinearNull.of((y - values)[whole], x) for name, values in loco.items()}
    nulls = nulls or {"": LinearNull.of(y[whole], x)}
    return Analysis(store, np.flatnonzero(whole), nulls, "linear")


def _logistic(
    store: GenotypeStore, y: np.ndarray, x: np.ndarray, whole: np.ndarray, loco: Mapping[str, np.ndarray], test: str
) -> Analysis:
    seen = set(np.unique(y[whole]).tolist())
    if seen == {1.0, 2.0}:
        y = y - 1
    elif seen != {0.0, 1.0}:
        raise refuse(
            "PHENOTYPE_NOT_BINARY", f"The phenotype has {len(seen)} values; 0/1 or 1/2 are wanted.", values=len(seen)
        )
    try:
        nulls: dict[str, LinearNull | LogisticNull]
        nulls = {name: LogisticNull.of(y[whole], x, values[whole]) for name, values in loco.items()}
        nulls = nulls or {"": LogisticNull.of(y[whole], x)}
    except ValueError:
        raise refuse(
            "COVARIATES_SEPARATE", "The covariates tell cases and controls apart by themselves.",
            remedy="Leave the covariate out that is known only of one of them.",
        ) from None  # fmt: skip
    return Analysis(store, np.flatnonzero(whole), nulls, test)


# ------------------------------------------------------------------------------------------------ run


def run(part: Part, model: Analysis, ctx: Context) -> PartResult:
    start, stop = model.store.layout.rows(int(part.params["part"]))
    found = associate(model, start, stop, ctx.threads, ctx.device)
    saved: Any = {field.name: getattr(found, field.name).astype(str) if field.name in ("error", "method")
                  else getattr(found, field.name) for field in fields(Tested)}  # fmt: skip
    np.savez(ctx.out / "tested.npz", **saved)
    return PartResult({"variants": stop - start, "tested": int(np.isfinite(found.p).sum())})


def associate(model: Analysis, start: int, stop: int, threads: int = 1, device: str = "cpu") -> Tested:
    """Every row from start to stop, chunks beside each other."""
    contig = model.store.contig(start, stop)
    pieces = [
        (start + a, start + b, model.store.contigs[contig[a]])
        for first, last in model.store.chunks(start, stop)
        for a, b in _same(contig, first - start, last - start)
    ]
    if threads == 1:
        return _joined([_test(model, *piece, device=device) for piece in pieces])
    with ThreadPoolExecutor(threads) as pool:
        return _joined(list(pool.map(lambda piece: _test(model, *piece, device=device), pieces)))


def _same(contig: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Stretches of one contig between two places."""
    edges = np.concatenate([[start], start + 1 + np.flatnonzero(np.diff(contig[start:stop])), [stop]])
    yield from pairwise(edges.tolist())


def _test(model: Analysis, start: int, stop: int, contig: str, *, device: str) -> Tested:
    packed = model.store.packed(start, stop)
    if len(model.people) != model.store.samples:
        packed = bits.take_samples(packed, model.people)
    null = model.null(contig)
    if isinstance(null, LinearNull):
        return association.linear(packed, null, device)
    return association.logistic(packed, null, model.test, device)


def _joined(pieces: Sequence[Tested]) -> Tested:
    return Tested(*(np.concatenate([getattr(piece, field.name) for piece in pieces]) for field in fields(Tested)))


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    params = Params.of(ctx.spec.params)
    store = open_store(ctx.spec)
    done = sorted(results, key=lambda item: int(item.part.params["part"]))
    suffix = "linear" if params.model == "linear" else f"logistic.{params.test}"
    name = f"{params.phenotype}.glm.{suffix}.gz"
    p, contigs, positions = [], [], []
    with gzip.open(ctx.out / name, "wt", encoding="utf-8", compresslevel=3) as file:
        effect = "T_STAT" if params.model == "linear" else "Z_STAT"
        file.write(f"#CHROM\tPOS\tID\tREF\tALT\tA1\tA1_FREQ\tTEST\tOBS_CT\tBETA\tSE\t{effect}\tP\tERRCODE\tMETHOD\n")
        for item in done:
            start, stop = store.layout.rows(int(item.part.params["part"]))
            with np.load(item.folder / "tested.npz") as saved:
                found = Tested(**{field.name: saved[field.name] for field in fields(Tested)})
            _write(file, store, start, stop, found)
            p.append(found.p)
            contigs += [store.contigs[k] for k in store.contig(start, stop)]
            positions.append(store.position(start, stop))
    values = np.concatenate(p) if p else np.zeros(0)
    plots.manhattan(contigs, np.concatenate(positions), values, ctx.out / "manhattan.png")
    plots.quantiles(values, ctx.out / "qq.png")
    tested = values[np.isfinite(values)]
    inflation = _inflation(tested)
    told = {"tested": len(tested), "genome_wide": int(np.sum(tested < 5e-8)), "inflation": inflation,
            "people": len(load_model(ctx.spec, ctx).people),
            "missing_blocks": store.layout.parts - len(done)}  # fmt: skip
    figures = [("manhattan.png", f"{params.phenotype}: −log10 p along the genome"), ("qq.png", f"λ = {inflation:.3f}")]
    return Result(values=told, metrics={"tested": float(len(tested)), "inflation": inflation}, figures=figures)


def _inflation(p: np.ndarray) -> float:
    from scipy import special

    if not len(p):
        return float("nan")
    return float(special.ndtri(np.median(p) / 2) ** 2 / _MEDIAN_CHI2)


def _write(file: Any, store: GenotypeStore, start: int, stop: int, found: Tested) -> None:
    contig, position = store.contig(start, stop), store.position(start, stop)
    name, alleles = store.id(start, stop), store.alleles(start, stop)
    for k in range(stop - start):
        a1 = alleles[k, 1] if found.a1_alt[k] else alleles[k, 0]
        numbers = "\t".join(_number(getattr(found, column)[k]) for column in ("beta", "se", "statistic", "p"))
        file.write(
            f"{store.contigs[contig[k]]}\t{position[k]}\t{name[k]}\t{alleles[k, 0]}\t{alleles[k, 1]}\t{a1}"
            f"\t{found.frequency[k]:.6g}\tADD\t{found.people[k]}\t{numbers}"
            f"\t{found.error[k] or '.'}\t{found.method[k]}\n"
        )


def _number(value: float) -> str:
    return f"{value:.7g}" if np.isfinite(value) else "NA"


WORKLOAD = Map(plan=plan, model=load_model, run=run, reduce=reduce, version=VERSION)
