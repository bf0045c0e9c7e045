"""Matrices into one store, with quality control, normalisation, variable features and principal components.

Round 1: each modality is read block by block, checked, and written as shards; sums for quality control on the way.
Round 2: mean and variance of every feature over blocks of rows; the most variable are chosen.
Round 3: products of the chosen features over the same blocks; their principal components.

Inputs: any number of matrices, each under its modality's name (`- {name: methylation, path: betas.tsv.gz}`); a MuData
file brings its own names.

`params` of the job:
    layer         ''        of an AnnData: this layer instead of X; `raw` for its raw matrix
    orientation   samples   what the rows of a table are: samples or features
    kinds         {}        by modality: counts, log or values; else whole sparse numbers are counts, other sparse
                            ones log, dense ones values (see `expression`)
    obs           []        columns of an AnnData's obs that are kept; nothing else that it says of people is copied
    subject       ''        the column of obs that names the person: kept as a pseudonym
    min_features  0         rows with fewer features there are left out, of counts and log
    max_mito      100       rows with more per cent of mitochondrial counts are left out
    min_rows      0         features that are there in fewer rows are left out
    target        10000     counts a row is normalised to; 1,000,000 makes counts per million
    variable      2000      most variable features that are chosen; 0 = all
    components    50        principal components; 0 = none
    block         50000     rows in a part

What is left out stays in the store, marked in `obs["kept"]` and `var["kept"]`; its components are NaN.
Results: `matrices.zarr` (`storage.matrices`), pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.storage.matrices import STORE, Modality, Rows, Unfit, Writer, assemble, dtypes
from permed_compute.workloads.omics import expression, matrices, plots
from permed_compute.workloads.omics.expression import Components, Moments, Quality
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result

VERSION = "2"
_BLOCK_VALUES = 4_000_000
"""Values of a block of rows that is in memory at a time, counted as if none were zero."""
_MOST_CHOSEN = 20_000
"""Features whose products are still held (3.2 GB)."""
_MITO = "MT-"


@dataclass(frozen=True, slots=True)
class Params:
    layer: str = ""
    orientation: str = "samples"
    obs: tuple[str, ...] = ()
    subject: str = ""
    min_features: int = 0
    max_mito: float = 100.0
    min_rows: int = 0
    target: float = 1e4
    variable: int = 2000
    components: int = 50
    block: int = 50_000

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        """Raises `SpecError` naming every parameter that is wrong. `kinds` is read by `_kinds`."""
        checked = Checked("omics/matrix", {name: value for name, value in given.items() if name != "kinds"}, cls)
        checked.one_of("orientation", *matrices.ORIENTATIONS)
        checked.between("target", 1, 1e9)
        checked.between("max_mito", 0, 100)
        checked.between("variable", 0, 1_000_000)
        checked.between("components", 0, 1000)
        checked.between("block", 100, 10_000_000)
        return checked.done()

    @property
    def filters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("min_features", "max_mito", "min_rows", "target")}


def _kinds(given: Mapping[str, Any]) -> dict[str, str]:
    kinds = given.get("kinds", {})
    if not isinstance(kinds, Mapping) or not set(kinds.values()) <= set(expression.KINDS):
        remedy = f"Write e.g. {{rna: counts}}; there are {', '.join(expression.KINDS)}."
        raise SpecError("params", [Problem("params.kinds", "is no mapping from modalities to kinds.", remedy=remedy)])
    return dict(kinds)


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    params = Params.of(spec.params)
    if not state:
        return _conversions(spec, params, ctx)
    parts = []
    for number, (name, about) in enumerate(state["modalities"].items()):
        given = {"modality": name, "kind": about["kind"], **params.filters}
        chosen = state.get("chosen", {}).get(name)
        if "chosen" in state and not chosen:
            continue
        if chosen:
            given |= {"chosen": chosen, "centre": state["centre"][name]}
        what = "products" if chosen else "moments"
        for start in range(0, about["rows"], params.block):
            stop = min(start + params.block, about["rows"])
            parts.append(
                Part(f"{what}-{number:03d}-{start:010d}", tuple(about["inputs"]),
                     {**given, "start": start, "stop": stop}, (about["folder"],))
            )  # fmt: skip
    return parts


def _conversions(spec: JobSpec, params: Params, ctx: Context) -> list[Part]:
    kinds = _kinds(spec.params)
    if not spec.inputs:
        remedy = "Write `- {name: rna, path: cells.h5ad}`."
        raise SpecError("job", [Problem("inputs", "no matrix.", remedy=remedy)])
    parts: dict[str, Part] = {}
    with ctx.stage("scan"):
        for ref in spec.inputs:
            path = Path(ref.path)
            if not path.exists():
                raise WorkloadError(f"The matrix of input {ref.name!r} is not there.", remedy="Look at `inputs:`.")
            digests = tuple(ctx.digest(file) for file in matrices.files_of(path))
            for name in matrices.names(path, ref.name):
                if name in parts:
                    raise SpecError("job", [Problem("inputs", f"two matrices are named {name!r}.")])
                given = {
                    "modality": name, "layer": params.layer, "orientation": params.orientation,
                    "obs": list(params.obs), "subject": params.subject, "kind": kinds.get(name, ""),
                }  # fmt: skip
                parts[name] = Part(f"matrix-{len(parts):03d}", digests, given, (str(path),))
    unknown = sorted(set(kinds) - set(parts))
    if unknown:
        raise SpecError("params", [Problem("params.kinds", f"names {unknown[0]!r}, which no input is.")])
    ctx.log(f"{len(parts)} modalities")
    return list(parts.values())


# ------------------------------------------------------------------------------------------------ run


def run(part: Part, model: None, ctx: Context) -> PartResult:
    if "start" not in part.params:
        return _convert(part, ctx)
    kept = _Kept(Path(part.sources[0]), part.params)
    start, stop = int(part.params["start"]), int(part.params["stop"])
    if "chosen" not in part.params:
        pieces = [
            expression.moments(block, factor, kept.kind) for _, _, block, factor in kept.blocks(start, stop)
        ]  # fmt: skip
        found = Moments.joined(pieces)
        np.savez(ctx.out / "moments.npz", rows=found.rows, total=found.total, square=found.square)
        return PartResult()
    chosen, centre = np.asarray(part.params["chosen"], np.int64), np.asarray(part.params["centre"])
    sums = expression.Products(chosen, centre, ctx.threads)
    for _, _, block, factor in kept.blocks(start, stop):
        sums.add(expression.normalised(block, factor, kept.kind))
    product, total = sums.summed()
    np.savez(ctx.out / "products.npz", product=product, total=total)
    return PartResult()


def _convert(part: Part, ctx: Context) -> PartResult:
    """`X/` as in the store, `quality.npz`, `obs.parquet` by pseudonym, `var.parquet`."""
    how = matrices.How(part.params["layer"], part.params["orientation"], ctx.scratch)
    name = part.params["modality"]
    with matrices.opened(Path(part.sources[0]), name, how, ctx.pseudonym) as source, ctx.stage("convert"):
        return _converted(source, part, ctx)


def _converted(source: matrices.Source, part: Part, ctx: Context) -> PartResult:
    import pandas as pd

    name = source.name
    is_sparse = part.params["kind"] in ("counts", "log") if part.params["kind"] else source.is_sparse
    obs = _frame(source, part.params, ctx)
    quality, dtype, stored = _written(source, ctx, is_sparse=is_sparse)
    kind = part.params["kind"] or ("values" if not is_sparse else "log" if dtype == "float32" else "counts")
    obs.to_parquet(ctx.out / "obs.parquet")
    pd.DataFrame(index=pd.Index(source.features, dtype=object)).to_parquet(ctx.out / "var.parquet")
    arrays: Any = quality.as_arrays()
    np.savez(ctx.out / "quality.npz", **arrays)
    nothing = int(np.sum(quality.row_features == 0))
    notes = []
    if nothing:
        first = int(np.argmin(quality.row_features))
        sentence = (
            f"{nothing} rows of modality {name!r} hold no value, first row {first + 1}"
            f" ({ctx.pseudonym(source.rows[first])[:12]})."
        )
        notes.append(Finding("ALL_MISSING", sentence, "note", numbers={"rows": nothing}))
    about = {"rows": len(source.rows), "features": len(source.features), "kind": kind, "dtype": dtype, "stored": stored}
    return PartResult({"modality": name, **about}, notes)


def _written(source: matrices.Source, ctx: Context, *, is_sparse: bool) -> tuple[Quality, str, int]:
    """Quality, the type that holds the values, and how many are stored."""
    folder = ctx.out / "X"
    mito = np.array([name.upper().startswith(_MITO) for name in source.features])
    for dtype in dtypes(is_sparse=is_sparse):
        writer = Writer(folder, len(source.features), dtype, is_sparse=is_sparse, threads=ctx.threads)
        pieces: list[Quality] = []
        try:
            for block in _checked(source, ctx, is_sparse=is_sparse):
                writer.append(block)
                pieces.append(Quality.of(block, mito))
            writer.close()
        except Unfit:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        quality = Quality.joined(pieces)
        stored = int(quality.feature_rows.sum())
        if not stored:
            raise refuse("EMPTY_MODALITY", f"Modality {source.name!r} holds no value in {len(source.rows)} rows.")
        return quality, dtype, stored
    raise AssertionError("float32 holds everything")


def _checked(source: matrices.Source, ctx: Context, *, is_sparse: bool) -> Iterator[Any]:
    from scipy import sparse

    size = max(1, min(8192, _BLOCK_VALUES // len(source.features)))
    first = 0
    for given in source.blocks(size):
        block = given
        if is_sparse and not source.is_sparse:
            block = sparse.csr_matrix(given)
        elif source.is_sparse and not is_sparse:
            block = given.toarray().astype(np.float64)
        values = block.data if is_sparse else block
        wrong = ~np.isfinite(values) | (values < 0) if is_sparse else np.isinf(values)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            row = int(np.searchsorted(block.indptr, at, "right")) - 1 if is_sparse else at // len(source.features)
            raise refuse(
                "NOT_A_NUMBER",
                f"Row {first + row + 1} of modality {source.name!r} ({ctx.pseudonym(source.rows[first + row])[:12]})"
                f" holds a value that is {'negative or ' if is_sparse else ''}not finite.",
                remedy="Counts are 0 and more; `kinds: {…: values}` takes any number.", row=first + row + 1,
            )  # fmt: skip
        first += block.shape[0]
        yield block
    if first != len(source.rows):
        raise refuse(
            "MATRIX_MISMATCH", f"Modality {source.name!r} has {len(source.rows)} names of rows and {first} rows.",
            rows=first,
        )  # fmt: skip


def _frame(source: matrices.Source, params: Mapping[str, Any], ctx: Context) -> Any:
    """What is kept of obs, by pseudonym."""
    import pandas as pd

    wanted = [*params["obs"], *([params["subject"]] if params["subject"] else [])]
    absent = [name for name in wanted if name not in source.obs.columns]
    if absent:
        raise refuse("COLUMN_ABSENT", f"Modality {source.name!r} has no column {absent[0]!r} in obs.")
    frame = source.obs[list(params["obs"])].copy()
    if params["subject"]:
        frame["subject"] = [ctx.pseudonym(str(each)) for each in source.obs[params["subject"]]]
    frame.index = pd.Index([ctx.pseudonym(name) for name in source.rows], dtype=object)
    return frame


class _Kept:
    """The rows and features of a converted modality that the filters leave."""

    def __init__(self, folder: Path, params: Mapping[str, Any]) -> None:
        self.kind, self.target = params["kind"], float(params["target"])
        self.matrix = Rows(folder / "X")
        loaded = np.load(folder / "quality.npz")
        self.quality = Quality(**{name: loaded[name] for name in loaded.files})
        self.features = self.quality.feature_rows >= max(params["min_rows"], 1)
        self.rows = self.quality.row_features >= params["min_features"]
        if self.kind != "values":
            self.rows &= (self.quality.mito_percent <= params["max_mito"]) & (self.quality.row_features > 0)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, Any, np.ndarray]]:
        """(first row, row behind the last, what is kept of them, (kept rows,) factor that normalises counts)."""
        size = max(1, min(8192, _BLOCK_VALUES // self.matrix.shape[1]))
        for a, b, whole in self.matrix.blocks(size, start, stop):
            block = whole if self.rows[a:b].all() else whole[self.rows[a:b]]
            block = block if self.features.all() else block[:, self.features]
            factor = np.ones(block.shape[0])
            if self.kind == "counts":
                sums = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
                factor = self.target / np.where(sums > 0, sums, 1)
            yield a, b, block, factor


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    params = Params.of(ctx.spec.params)
    if ctx.missed:
        first = next(iter(ctx.missed.values()))
        raise WorkloadError(
            f"Half a store is none, and {len(ctx.missed)} parts have no result; the first: {first}",
            remedy="Mend it and resume the job.",
        )
    if not state:
        for finding in (finding for item in results for finding in item.findings):
            ctx.finding(finding)  # a job's result shows the parts of its last round only
        return Next({"modalities": {
            item.values["modality"]: {**item.values, "folder": str(item.folder), "inputs": list(item.part.inputs)}
            for item in sorted(results, key=lambda item: item.part.name)
        }})  # fmt: skip
    if "chosen" not in state:
        folders: dict[str, list[str]] = {name: [] for name in state["modalities"]}
        for item in sorted(results, key=lambda item: item.part.name):
            folders[item.part.params["modality"]].append(str(item.folder))
        following = {**state, "moments": folders, "chosen": {}, "centre": {}}
        for name in state["modalities"]:
            kept, found, chosen, _ = _chosen(name, following, params)
            if params.components and int(kept.rows.sum()) > 2 and len(chosen) > 2:
                following["chosen"][name], following["centre"][name] = chosen.tolist(), found.mean[chosen].tolist()
        return Next(following) if any(following["chosen"].values()) else _finish([], following, params, ctx)
    return _finish(results, state, params, ctx)


def _chosen(
    name: str, state: Mapping[str, Any], params: Params
) -> tuple[_Kept, Moments, np.ndarray, dict[str, np.ndarray]]:
    """What is kept, and of the kept features: moments, the numbers of those chosen, and columns that say why."""
    about = state["modalities"][name]
    kept = _Kept(Path(about["folder"]), {"kind": about["kind"], **params.filters})
    loaded = [np.load(Path(folder) / "moments.npz") for folder in state["moments"][name]]
    found = Moments.joined([Moments(one["rows"], one["total"], one["square"]) for one in loaded])
    everything = np.ones(len(found.rows), bool)
    wanted = params.variable if 0 < params.variable < len(found.rows) else 0
    chosen, why = expression.highly_variable(found, about["kind"], wanted or len(found.rows), everything)
    chosen = chosen if wanted else everything
    if params.components and chosen.sum() > _MOST_CHOSEN:
        raise refuse(
            "TOO_MANY_FOR_COMPONENTS", f"Components of {int(chosen.sum())} features are too many.",
            remedy=f"Write `variable:` of at most {_MOST_CHOSEN}.", features=int(chosen.sum()),
        )  # fmt: skip
    return kept, found, np.flatnonzero(chosen), why


def _finish(results: Sequence[DonePart], state: Mapping[str, Any], params: Params, ctx: Context) -> Result:
    """The store, whole."""
    made: dict[str, Modality] = {}
    values: dict[str, Any] = {}
    figures: list[tuple[str, str]] = []
    for number, name in enumerate(state["modalities"]):
        kept, found, chosen, why = _chosen(name, state, params)
        mine = [item for item in results if item.part.params["modality"] == name]
        about = state["modalities"][name]
        told: dict[str, Any] = {key: about[key] for key in ("rows", "features", "kind", "dtype", "stored")}
        told |= {"rows_kept": int(kept.rows.sum()), "features_kept": int(kept.features.sum()), "chosen": len(chosen)}
        one = _modality(about, kept, chosen, why)
        if mine:
            with ctx.stage("components"):
                pca = _components(mine, kept, chosen, found, params, one)
            told["variance_ratio"] = [round(float(ratio), 6) for ratio in pca.ratio[:10]]
            figures += _pictures(number, name, kept, one, ctx)
        made[name], values[name] = one, told
    with ctx.stage("assemble"):
        assemble(ctx.out / STORE, made)
    counted = {f"{name}_rows": float(told["rows_kept"]) for name, told in values.items()}
    return Result(values={"store": STORE, "modalities": values}, metrics=counted, figures=figures)


def _modality(about: Mapping[str, Any], kept: _Kept, chosen: np.ndarray, why: Mapping[str, np.ndarray]) -> Modality:
    import pandas as pd

    folder, quality = Path(about["folder"]), kept.quality
    obs, var = pd.read_parquet(folder / "obs.parquet"), pd.read_parquet(folder / "var.parquet")
    obs["kept"], var["kept"] = kept.rows, kept.features
    if about["kind"] == "values":
        obs["n_observed"], var["n_observed"] = quality.row_features, quality.feature_rows
    else:
        obs["n_genes_by_counts"], obs["total_counts"] = quality.row_features, quality.row_sum
        obs["total_counts_mt"], obs["pct_counts_mt"] = quality.row_mito, quality.mito_percent
        var["n_cells_by_counts"], var["total_counts"] = quality.feature_rows, quality.feature_sum
        var["mean_counts"] = quality.feature_sum / max(1, len(obs))
        var["pct_dropout_by_counts"] = 100 * (1 - quality.feature_rows / max(1, len(obs)))
    for name, column in why.items():
        var[name] = np.nan
        var.loc[kept.features, name] = column
    marks = np.zeros(len(var), bool)
    marks[np.flatnonzero(kept.features)[chosen]] = True
    var["highly_variable"] = marks
    told = {"kind": about["kind"], "target": kept.target} if about["kind"] == "counts" else {"kind": about["kind"]}
    return Modality(folder / "X", obs, var, {}, {}, {"permed": told})


def _components(
    results: Sequence[DonePart], kept: _Kept, chosen: np.ndarray, found: Moments, params: Params, one: Modality
) -> Components:
    """Components from the parts' products; scores and loadings into `one`."""
    product, total = np.zeros((len(chosen), len(chosen))), np.zeros(len(chosen))
    for item in results:
        loaded = np.load(item.folder / "products.npz")
        product += loaded["product"]
        total += loaded["total"]
    rows = int(kept.rows.sum())
    count = min(params.components, rows - 1, len(chosen) - 1)
    pca = expression.components(product, total, rows, count)
    centre = found.mean[chosen] if kept.kind == "values" else None
    scores = np.full((kept.matrix.shape[0], count), np.nan, np.float32)
    for a, b, block, factor in kept.blocks(0, kept.matrix.shape[0]):
        made = pca.scores(expression.normalised(block, factor, kept.kind), chosen, centre)
        scores[a:b][kept.rows[a:b]] = made
    loadings = np.zeros((len(kept.features), count))
    loadings[np.flatnonzero(kept.features)[chosen]] = pca.loadings
    one.obsm, one.varm = {"X_pca": scores}, {"PCs": loadings}
    one.uns = {**one.uns, "pca": {"variance": pca.variance, "variance_ratio": pca.ratio}}
    return pca


def _pictures(number: int, name: str, kept: _Kept, one: Modality, ctx: Context) -> list[tuple[str, str]]:
    scores = one.obsm["X_pca"][kept.rows]
    shown = scores[:: max(1, len(scores) // 20_000)]
    place = f"components-{number:03d}.png"
    plots.scatter(shown[:, 0], shown[:, 1 % shown.shape[1]], ctx.out / place, ("PC1", "PC2"))
    figures = [(place, f"{name}: principal components of {len(scores)} rows")]
    if kept.kind == "counts":
        plots.histogram(kept.quality.row_sum, ctx.out / f"counts-{number:03d}.png", f"{name}: counts of a row")
        figures.append((f"counts-{number:03d}.png", f"{name}: counts of a row"))
    return figures


WORKLOAD = Map(plan=plan, run=run, reduce=reduce, version=VERSION)
