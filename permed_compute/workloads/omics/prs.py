"""Polygenic scores of everybody in a store: any number of scoring files at once, a part for every block of variants.

Inputs: `genotypes` (a store, or the folder of the convert job) and any number named `score`; optionally
`frequencies` (frozen ALT frequencies for missing genotypes: plink2's .afreq columns) and `reference` (the
`distribution.json` of an earlier job, to normalise by).

`params` of the job:
    min_match     0.75    least share of a score's rows that must match; below it the score is refused, with reasons
    ambiguous     drop    A/T and C/G variants: drop, or keep (both files are on the forward strand)
    flip          true    try the other strand where alleles do not fit
    missing       mean    a missing genotype counts as twice the allele's frequency; `zero`: as nothing
    block         0       variants in a part, a multiple of the store's parts; 0 = one of the store's parts

Results: `<score>.sscore` (plink2's columns, ids by pseudonym), `<score>.match.tsv.gz` (a line for every row of the
scoring file), `distribution.json` and a picture of each score's distribution.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, SpecError
from permed_compute.learning.evidence import digest_of
from permed_compute.paths import read_json, write_json
from permed_compute.spec import JobSpec
from permed_compute.storage.genotypes import MISSING_DOSAGE, GenotypeStore, dosage_as_float
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics import plots, scores
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.omics.read import contig_name, refuse
from permed_compute.workloads.omics.scores import Match, Policy, Weights
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "2"
_LEAST_FOR_FREQUENCIES = 50
_ONE_BY_ONE = 8
"""Up to so many scores a pass over the bytes for each is faster than unpacking for a matrix product."""
_RARE = 12
"""A row in which fewer than one person in so many differs from the common genotype is summed over these people."""
_MODEL = ("score", "frequencies", "reference")
"""Inputs that decide what somebody's genotypes come to."""
_SAMPLE_TILE = 8192
_VARIANT_TILE = 256


@dataclass(frozen=True, slots=True)
class Params:
    min_match: float = 0.75
    ambiguous: str = "drop"
    flip: bool = True
    missing: str = "mean"
    block: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        checked = Checked("omics/prs", given, cls)
        checked.one_of("ambiguous", "drop", "keep")
        checked.one_of("missing", "mean", "zero")
        checked.between("min_match", 0, 1)
        return checked.done()

    @property
    def policy(self) -> Policy:
        return Policy(self.ambiguous, self.flip)


def inputs_of(spec: JobSpec, name: str) -> list[Path]:
    return [Path(ref.path) for ref in spec.inputs if ref.name == name]


def open_store(spec: JobSpec) -> GenotypeStore:
    """The job's genotypes. Raises `SpecError` where it names none or several."""
    found = inputs_of(spec, "genotypes")
    if len(found) != 1:
        raise SpecError(
            "job", [Problem("inputs", f"{len(found)} inputs are named genotypes.", remedy="Name one store.")]
        )
    return GenotypeStore.find(found[0])


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part for every block that has a matched variant, and one for every score that is refused."""
    params = Params.of(spec.params)
    store = open_store(spec)
    files = inputs_of(spec, "score")
    if not files:
        raise SpecError("job", [Problem("inputs", "no score.", remedy="Write `- {name: score, path: …}`.")])
    with ctx.stage("match"):
        matches = match_all(store, files, params)
    parts = []
    for file, match in zip(files, matches, strict=True):
        write_match_log(match, store, ctx.out / f"{match.score.name}.match.tsv.gz")
        if not _passes(match, params):
            given = {"refused": match.score.name, "min_match": params.min_match}
            parts.append(Part(f"score-{match.score.name}", (ctx.digest(file),), given, (str(file), str(store.root))))
    kept = [match for match in matches if _passes(match, params)]
    if not kept:
        return parts
    if store.samples < _LEAST_FOR_FREQUENCIES and params.missing == "mean" and not inputs_of(spec, "frequencies"):
        raise refuse(
            "TOO_FEW_FOR_FREQUENCIES",
            f"{store.samples} people are too few to estimate allele frequencies from (least {_LEAST_FOR_FREQUENCIES}).",
            remedy="Give frozen `frequencies`, or write `params: {missing: zero}`.", samples=store.samples,
        )  # fmt: skip
    weights = Weights.of(kept)
    about = hashlib.sha256(weights.weight.tobytes() + weights.counts_ref.tobytes()).hexdigest()
    frozen = tuple(ctx.digest(file) for file in inputs_of(spec, "frequencies"))
    size = params.block or store.layout.part_variants
    for start in range(0, store.variants, size):
        stop = min(start + size, store.variants)
        rows = weights.between(start, stop)
        if rows.start == rows.stop:
            continue
        pieces = range(start // store.layout.part_variants, (stop - 1) // store.layout.part_variants + 1)
        digests = [ctx.digest(file) for piece in pieces for file in store.files(piece)]
        given = {"start": start, "stop": stop, "weights": about, "missing": params.missing}
        parts.append(Part(f"rows-{start:010d}", (*digests, *frozen), given, (str(store.root),)))
    ctx.log(f"{len(kept)} of {len(matches)} scores, {len(weights.rows)} variants, {len(parts)} parts")
    return parts


_last_matched: dict[Any, list[Match]] = {}


def match_all(store: GenotypeStore, files: Sequence[Path], params: Params) -> list[Match]:
    """Every file's match; the last answer is kept: plan, model and reduce of one process ask the same."""
    key = (store.root, store.root.stat().st_mtime_ns, tuple((f, f.stat().st_mtime_ns) for f in files), params)
    if key not in _last_matched:
        _last_matched.clear()
        _last_matched[key] = _match_all(store, files, params)
    return _last_matched[key]


def _match_all(store: GenotypeStore, files: Sequence[Path], params: Params) -> list[Match]:
    index = scores.Index(store)
    matches = []
    for file in files:
        score = scores.read_score(file)
        scores.check_build(score, store.build)
        matches.append(index.match(score, params.policy))
    names = [match.score.name for match in matches]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError("job", [Problem("inputs", f"{len(twice)} scores have one name, first {twice[0]!r}.")])
    return matches


def _passes(match: Match, params: Params) -> bool:
    return len(match.used) > 0 and match.rate >= params.min_match


def write_match_log(match: Match, store: GenotypeStore, path: Path) -> None:
    """A line for every row of the scoring file, in its order: what it asked for and what became of it."""
    with gzip.open(path, "wt", encoding="utf-8", newline="", compresslevel=3) as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(
            ["row", "chr", "pos", "effect_allele", "other_allele", "weight", "status", "store_row", "counts"]
        )
        for k, row in enumerate(match.score.rows):
            found = int(match.store_row[k])
            counted = ("REF" if match.counts_ref[k] else "ALT") if found >= 0 else ""
            at = [k, row.contig, row.position or "", row.effect, row.other, repr(row.weight)]
            table.writerow([*at, match.status[k], found if found >= 0 else "", counted])


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Scoring:
    """What every part needs: the matched weights, and frozen frequencies of ALT per matched row (NaN = not given).

    The columns computed are the scores and, behind them, one column of ones for every set of counted alleles.
    """

    store: GenotypeStore
    weights: Weights
    frequency: np.ndarray | None
    columns: np.ndarray
    counts_ref: np.ndarray
    set_of: np.ndarray
    """(K,) which column of ones belongs to a score."""


def load_model(spec: JobSpec, ctx: Context) -> Scoring | None:
    params = Params.of(spec.params)
    store = open_store(spec)
    with ctx.stage("match"):
        kept = [match for match in match_all(store, inputs_of(spec, "score"), params) if _passes(match, params)]
    if not kept:
        return None
    weights = Weights.of(kept)
    frozen = inputs_of(spec, "frequencies")
    return scoring(store, weights, read_frequencies(frozen[0], store, weights.rows) if frozen else None)


def scoring(store: GenotypeStore, weights: Weights, frequency: np.ndarray | None = None) -> Scoring:
    marks = np.where(weights.used, np.where(weights.counts_ref, 2, 1), 0).astype(np.int8)
    place: dict[bytes, int] = {}
    set_of = np.array([place.setdefault(column.tobytes(), len(place)) for column in np.ascontiguousarray(marks.T)])
    unique = np.array([np.frombuffer(column, np.int8) for column in place]).reshape(len(place), -1).T
    columns = np.concatenate([weights.weight, (unique > 0).astype(np.float64)], axis=1)
    counts_ref = np.concatenate([weights.counts_ref, unique == 2], axis=1)
    return Scoring(store, weights, frequency, columns, counts_ref, set_of)


def read_frequencies(path: Path, store: GenotypeStore, rows: np.ndarray) -> np.ndarray:
    """ALT frequencies of the store's `rows` from a table with plink2's .afreq columns; NaN where it has none."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        lines = [line.split() for line in file if not line.startswith("##")]
    header = [name.lstrip("#") for name in lines[0]]
    at = {name: header.index(name) for name in ("REF", "ALT", "ALT_FREQS")}
    chrom, pos, name = (header.index(k) if k in header else -1 for k in ("CHROM", "POS", "ID"))
    known: dict[Any, float] = {}
    for row in lines[1:]:
        key = (contig_name(row[chrom]), int(row[pos])) if pos >= 0 else row[name]
        known[(key, row[at["REF"]], row[at["ALT"]])] = float(row[at["ALT_FREQS"]])
        known[(key, row[at["ALT"]], row[at["REF"]])] = 1 - float(row[at["ALT_FREQS"]])
    contig, position, alleles, ids = store.contig(), store.position(), store.alleles(), store.id()
    found = np.full(len(rows), np.nan)
    for k, r in enumerate(rows):
        key = (store.contigs[contig[r]], int(position[r])) if pos >= 0 else str(ids[r])
        found[k] = known.get((key, *alleles[r]), np.nan)
    return found


# ------------------------------------------------------------------------------------------------ run


def run(part: Part, model: Scoring | None, ctx: Context) -> PartResult:
    """Partial sums of the block: float64, one row a sample, one column a score or a set of counted alleles."""
    if "refused" in part.params:
        _refuse_low_match(part, ctx)
    assert model is not None
    start, stop = int(part.params["start"]), int(part.params["stop"])
    sums, missing = score_rows(model, start, stop, str(part.params["missing"]), ctx.threads, ctx.device)
    np.save(ctx.out / "sums.npy", sums)
    np.save(ctx.out / "missing.npy", missing)
    rows = model.weights.between(start, stop)
    return PartResult({"variants": rows.stop - rows.start})


def _refuse_low_match(part: Part, ctx: Context) -> None:
    params = Params.of(ctx.spec.params)
    match = scores.Index(GenotypeStore(Path(part.sources[1]))).match(
        scores.read_score(Path(part.sources[0])), params.policy
    )
    reasons = {name: count for name, count in match.reasons().items() if name not in scores.MATCHED}
    told = ", ".join(f"{count} {name}" for name, count in reasons.items())
    raise refuse(
        "LOW_MATCH",
        f"{len(match.used)} of {len(match.status)} variants of {match.score.name} match ({match.rate:.1%};"
        f" least {params.min_match:.0%}): {told}.",
        part.inputs[0],
        "Look at the match log: another build, other alleles, or genotypes that need imputation.",
        rows=len(match.status), matched=len(match.used), **reasons,
    )  # fmt: skip


def score_rows(
    model: Scoring, start: int, stop: int, missing: str, threads: int = 1, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """(samples, columns) float64 sums of rows start … stop; (samples, sets) int64 matched rows that are missing.

    Chunks are added in their order, whatever the number of threads: the same bits on any machine of one kind.
    """
    chunks = [
        (a, b) for a, b in model.store.chunks(start, stop)
        if (rows := model.weights.between(a, b)).stop > rows.start
    ]  # fmt: skip
    width = model.columns.shape[1]
    sums = np.zeros((model.store.samples, width))
    absent = np.zeros((model.store.samples, width - len(model.weights.names)))
    if threads == 1 or len(chunks) == 1:
        for a, b in chunks:
            _add(sums, absent, _chunk(model, a, b, missing, device))
        return sums, absent.astype(np.int64)
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for a, b in chunks:
            waiting.append(pool.submit(_chunk, model, a, b, missing, device))
            if len(waiting) > threads:  # so many chunks are in memory, and no more
                _add(sums, absent, waiting.pop(0).result())
        for future in waiting:
            _add(sums, absent, future.result())
    return sums, absent.astype(np.int64)


def _add(sums: np.ndarray, absent: np.ndarray, given: tuple[np.ndarray, np.ndarray]) -> None:
    sums += given[0]
    absent += given[1]


def _chunk(model: Scoring, start: int, stop: int, missing: str, device: str) -> tuple[np.ndarray, np.ndarray]:
    at = model.weights.between(start, stop)
    rows = model.weights.rows[at] - start
    samples = model.store.samples
    packed = model.store.packed(start, stop)
    packed = packed if len(rows) == len(packed) else packed[rows]
    columns, ref = model.columns[at], model.counts_ref[at]
    counted = bits.counts(packed, samples)
    known = np.maximum(2 * counted[:, :3].sum(axis=1), 1)
    frequency = (counted[:, 1] + 2 * counted[:, 2]) / known
    if model.frequency is not None:
        frozen = model.frequency[at]
        frequency = np.where(np.isnan(frozen), frequency, frozen)
    dosage = model.store.dosage(start, stop)
    first_set = len(model.weights.names)
    if dosage is not None:
        return _from_dosage(
            dosage[rows], columns, ref, frequency, missing, first_set, known=model.frequency is not None
        )
    mean = np.where(ref, 2 - 2 * frequency[:, None], 2 * frequency[:, None])
    signed, constant = np.where(ref, -columns, columns), (2 * columns * ref).sum(axis=0)
    # A missing call adds nothing, or the mean; of a counted REF the constant has counted two copies already.
    instead = columns * np.where(np.arange(columns.shape[1]) < first_set, mean if missing == "mean" else 0, 0)
    instead -= 2 * columns * ref
    used = columns[:, first_set:]
    last = columns.shape[1]
    first = 0 if first_set <= _ONE_BY_ONE or device != "cpu" else first_set
    sums = np.empty((samples, last))
    given = np.hstack([signed[:, first:], np.zeros_like(used)]), np.hstack([instead[:, first:], used])
    found = _passes_over(packed, *given, samples, device)
    np.add(found[:, : last - first], constant[first:], out=sums[:, first:])
    if first:
        many, more = _many(packed, counted, signed[:, :first], instead[:, :first], 2 * frequency, samples)
        np.add(many, constant[:first] + more, out=sums[:, :first])
    return sums, found[:, last - first :]


def _passes_over(packed: np.ndarray, copies: np.ndarray, absent: np.ndarray, samples: int, device: str) -> np.ndarray:
    if device == "cpu":
        return bits.score(packed, copies, absent, samples)
    from permed_compute.workloads.omics import device as gpu  # torch takes seconds to import; a few scores need none

    return gpu.score(packed, copies, absent, samples, device)


def _many(
    packed: np.ndarray, counted: np.ndarray, signed: np.ndarray, instead: np.ndarray, mean: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """(samples, columns) float64: copies of ALT times `signed`, `instead` where missing; and what all have besides.

    Rows that few people differ in cost by those people; the others are one matrix product.
    """
    turn = counted[:, 2] > counted[:, 0]
    carriers = counted[:, 1] + np.minimum(counted[:, 0], counted[:, 2]) + counted[:, 3]
    rare = carriers <= samples // _RARE
    sums, constant = np.zeros((samples, signed.shape[1])), np.zeros(signed.shape[1])
    if rare.any():
        called, missing = bits.split(packed[rare], samples, turn[rare])
        side, turned = signed[rare], turn[rare, None]
        constant = 2 * (side * turned).sum(axis=0)
        bits.scatter(called, np.where(turned, -side, side), samples, sums)
        bits.scatter(missing, instead[rare] - 2 * side * turned, samples, sums)
    if not rare.all():
        rows = packed[~rare]
        sums += _product(rows, signed[~rare], mean[~rare], samples)
        other = instead[~rare] - signed[~rare] * mean[~rare, None]
        if np.abs(other).max() > 1e-12:
            bits.scatter(bits.split(rows, samples)[1], other, samples, sums)
    return sums, constant


def _product(packed: np.ndarray, signed: np.ndarray, mean: np.ndarray, samples: int) -> np.ndarray:
    """(samples, columns) float64: copies of ALT (`mean` where missing) times signed weights, by tiles that stay in the
    cache."""
    import torch

    width = packed.shape[1]
    out = np.zeros((signed.shape[1], 4 * width))
    table = np.column_stack([np.zeros(len(mean)), np.ones(len(mean)), np.full(len(mean), 2.0), mean]).astype(np.float32)
    given = torch.from_numpy(np.ascontiguousarray(signed.T, np.float32))
    packed = np.ascontiguousarray(packed)
    tile = np.empty((_VARIANT_TILE, min(_SAMPLE_TILE, 4 * width)), np.float32)
    for first in range(0, width, _SAMPLE_TILE // 4):
        last = min(first + _SAMPLE_TILE // 4, width)
        for row in range(0, len(packed), _VARIANT_TILE):
            end = min(row + _VARIANT_TILE, len(packed))
            view = tile[: end - row, : 4 * (last - first)]
            bits.unpack_table(packed[row:end], table[row:end], first, view)
            out[:, 4 * first : 4 * last] += (given[:, row:end] @ torch.from_numpy(view)).numpy()
    return np.asarray(out[:, :samples].T)


def _from_dosage(
    dosage: np.ndarray, columns: np.ndarray, ref: np.ndarray, frequency: np.ndarray, missing: str, first_set: int, *,
    known: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    copies = dosage_as_float(dosage).astype(np.float64)
    lost = dosage == MISSING_DOSAGE
    if not known:
        with np.errstate(invalid="ignore"):
            seen = (~lost).sum(axis=1)
            frequency = np.where(lost, 0, copies).sum(axis=1) / np.maximum(2 * seen, 1)
    copies = np.where(lost, 2 * frequency[:, None], copies)
    sums = copies.T @ np.where(ref, -columns, columns) + (2 * columns * ref).sum(axis=0)
    absent = lost.T.astype(np.float64) @ columns[:, first_set:]
    nothing = slice(0 if missing == "zero" else first_set, None)
    mean = np.where(ref, 2 - 2 * frequency[:, None], 2 * frequency[:, None])
    sums[:, nothing] -= lost.T.astype(np.float64) @ (columns * mean)[:, nothing]
    return sums, absent


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    done = sorted((item for item in results if "start" in item.part.params), key=lambda item: item.part.name)
    model = load_model(ctx.spec, ctx)
    expected = [part for part in plan(ctx.spec, state, ctx) if "start" in part.params]
    if model is None:
        return Result(values={"scores": {}})  # every score has its part, and each says why it was refused
    if len(done) != len(expected):
        raise refuse(
            "SCORE_INCOMPLETE", f"{len(expected) - len(done)} of {len(expected)} blocks have no result: no sum.",
            remedy="`permed results JOB` says why; resume the job when that is mended.",
        )  # fmt: skip
    sums = sum(np.load(item.folder / "sums.npy") for item in done)
    absent = sum(np.load(item.folder / "missing.npy") for item in done)
    count = len(model.weights.names)
    reference = _reference(ctx.spec)
    values: dict[str, Any] = {"samples": model.store.samples, "variants": len(model.weights.rows), "scores": {}}
    distribution, figures = {}, []
    for k, name in enumerate(model.weights.names):
        which = int(model.set_of[k])
        used = int(model.weights.used[:, k].sum())
        alleles = 2 * used - 2 * absent[:, which]
        of_all = Params.of(ctx.spec.params).missing == "mean"  # imputed ones count among those averaged over
        own = _moments(sums[:, k])
        mean, deviation = reference.get(name, own)["mean"], reference.get(name, own)["sd"]
        z = (sums[:, k] - mean) / deviation if deviation > 0 else np.zeros(len(sums))
        _write_sscore(
            ctx.out / f"{name}.sscore", model.store, name, alleles, sums[:, count + which], sums[:, k],
            sums[:, k] / np.maximum(2 * used if of_all else alleles, 1), z,
        )  # fmt: skip
        distribution[name] = own
        picture = f"{name}.png"
        plots.histogram(sums[:, k], ctx.out / picture, f"{name}: sum of weights")
        figures.append((picture, f"{name}: {used} variants, {len(sums)} people"))
        by = "reference" if name in reference else "cohort"
        values["scores"][name] = {"variants": used, "normalised_by": by, **own}
    write_json(ctx.out / "distribution.json", distribution)
    return Result(values=values, metrics={"scores": float(count), "variants": float(len(model.weights.rows))},
                  figures=figures, findings=_match_findings(ctx, model))  # fmt: skip


def _reference(spec: JobSpec) -> Mapping[str, Any]:
    given = inputs_of(spec, "reference")
    return (read_json(given[0]) or {}) if given else {}


def _moments(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0}


def _match_findings(ctx: Context, model: Scoring) -> list[Finding]:
    params = Params.of(ctx.spec.params)
    told = []
    for match in match_all(model.store, inputs_of(ctx.spec, "score"), params):
        reasons = match.reasons()
        told.append(
            Finding(
                "SCORE_MATCH", f"{match.score.name}: {len(match.used)} of {len(match.status)} variants match.", "note",
                numbers={"rows": len(match.status), **reasons},
            )
        )  # fmt: skip
    return told


def _write_sscore(
    path: Path, store: GenotypeStore, name: str, alleles: np.ndarray, named: np.ndarray, total: np.ndarray,
    average: np.ndarray, z: np.ndarray,
) -> None:  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        file.write(f"#IID\tALLELE_CT\tNAMED_ALLELE_DOSAGE_SUM\t{name}_AVG\t{name}_SUM\t{name}_Z\n")
        for k, sample in enumerate(store.sample_id):
            numbers = f"{int(alleles[k])}\t{named[k]:.8g}\t{average[k]:.10g}\t{total[k]:.10g}\t{z[k]:.6g}"
            file.write(f"{sample}\t{numbers}\n")


def model_digest(spec: JobSpec, ctx: Context) -> str:
    """A score is a model: its file, what missing genotypes count as, and what it is normalised by. '' without one."""
    if not inputs_of(spec, "score"):
        return ""
    return digest_of(f"{name} {ctx.digest(file)}" for name in _MODEL for file in inputs_of(spec, name))


WORKLOAD = Map(plan=plan, model=load_model, run=run, reduce=reduce, model_digest=model_digest, version=VERSION)
