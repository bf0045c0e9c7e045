"""Job `omics/factors`: a factor model over the modalities of a matrix store (MOFA, by its own library mofapy2).

`inputs`: `matrices`, a store of `omics/matrix`. People of any modality are in it; one that a person lacks is missing,
not zero. Of each modality the chosen features count (`var["highly_variable"]`): counts as log1p, values that are all 0
or 1 with a Bernoulli likelihood, the others with a normal one, each modality scaled to variance one.

`params` of the job:
    modalities  []        which; none: all
    factors     10        at most; those that explain less than `least` of every modality are dropped
    least       0.005
    iterations  1000      at most

Results: `factors.parquet` (people by pseudonym × factors), `weights-<modality>.parquet` (features × factors),
`explained.json` (share of variance by modality and factor). The same seed gives the same factors on one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.storage.matrices import Matrix, MatrixStore
from permed_compute.workloads.omics import expression, plots
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

INPUT = "matrices"
FACTORS, EXPLAINED = "factors.parquet", "explained.json"
VERSION = "1"
_MOST_VALUES = 50_000_000
"""People × features: mofapy2 holds about a dozen such matrices as float64."""


@dataclass(frozen=True, slots=True)
class Params:
    modalities: tuple[str, ...] = ()
    factors: int = 10
    least: float = 0.005
    iterations: int = 1000

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        """Raises `SpecError` naming every parameter that is wrong."""
        checked = Checked("omics/factors", given, cls)
        checked.between("factors", 1, 200)
        checked.between("least", 0, 1)
        checked.between("iterations", 10, 100_000)
        return checked.done()


@dataclass(frozen=True, slots=True)
class View:
    """A modality as the model sees it. values: (people, features) float64, NaN where missing."""

    name: str
    values: np.ndarray
    features: Sequence[str]

    @property
    def likelihood(self) -> str:
        known = self.values[~np.isnan(self.values)]
        return "bernoulli" if np.isin(known, (0, 1)).all() else "gaussian"


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    params = Params.of(spec.params)
    store = MatrixStore.find(ctx.input(INPUT))
    names = params.modalities or tuple(store.names)
    for name in names:
        store[name]  # raises where there is none
    digest = hashlib.sha256("".join(ctx.digest(file) for file in store.files()).encode()).hexdigest()
    given = {"modalities": list(names), "factors": params.factors, "least": params.least, "of": params.iterations}
    return [Part("factors", (digest,), {**given, "seed": spec.seed}, (str(store.root),))]


def views_of(store: MatrixStore, names: Sequence[str]) -> tuple[list[str], list[View]]:
    """Everybody's pseudonyms, sorted, and each modality in that order. Raises `RefusedInput` TOO_MANY_FOR_FACTORS."""
    people = sorted({str(name) for each in names for name in _kept_rows(store[each])[0]})
    sizes = [int(store[name].var["highly_variable"].sum()) for name in names]
    if len(people) * sum(sizes) > _MOST_VALUES:
        raise refuse(
            "TOO_MANY_FOR_FACTORS", f"{len(people)} people × {sum(sizes)} features are too many for mofapy2.",
            remedy="Choose fewer features (`variable:` of omics/matrix), or take omics/vae.", people=len(people),
        )  # fmt: skip
    place = {name: k for k, name in enumerate(people)}
    return people, [_view(store[name], place) for name in names]


def _kept_rows(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    kept = matrix.obs["kept"].to_numpy(bool)
    return matrix.obs.index.to_numpy()[kept], np.flatnonzero(kept)


def _view(matrix: Matrix, place: Mapping[str, int]) -> View:
    chosen = np.flatnonzero(matrix.var["highly_variable"].to_numpy(bool))
    told = matrix.uns["permed"]
    kind, names = str(told["kind"]), matrix.obs.index.to_numpy()
    kept = set(_kept_rows(matrix)[1].tolist())
    values = np.full((len(place), len(chosen)), np.nan)
    for a, b, block in matrix.rows.blocks(4096):
        factor = np.ones(b - a)
        if kind == "counts":
            sums = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            factor = float(told["target"]) / np.where(sums > 0, sums, 1)
        made = expression.normalised(block, factor, kind)[:, chosen]
        dense = made.toarray() if matrix.rows.is_sparse else made
        for row in range(a, b):
            if row in kept:
                values[place[str(names[row])]] = dense[row - a]
    return View(matrix.name, values, [str(each) for each in matrix.var.index[chosen]])


def run(part: Part, model: None, ctx: Context) -> PartResult:
    import pandas as pd

    given = part.params
    with ctx.stage("read"):
        people, views = views_of(MatrixStore(Path(part.sources[0])), given["modalities"])
    with ctx.stage("fit"):
        scores, weights, explained = fitted(
            people, views, factors=given["factors"], least=given["least"], iterations=given["of"], seed=given["seed"]
        )  # fmt: skip
    columns = [f"factor{k + 1}" for k in range(scores.shape[1])]
    pd.DataFrame(scores, index=people, columns=columns).to_parquet(ctx.out / FACTORS)
    for view, mine in zip(views, weights, strict=True):
        pd.DataFrame(mine, index=list(view.features), columns=columns).to_parquet(
            ctx.out / f"weights-{view.name}.parquet"
        )  # fmt: skip
    told = {view.name: [round(float(share), 6) for share in row] for view, row in zip(views, explained, strict=True)}
    write_json(ctx.out / EXPLAINED, told)
    return PartResult({"people": len(people), "factors": len(columns), "explained": told})


def fitted(
    people: Sequence[str], views: Sequence[View], *, factors: int, least: float, iterations: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(people, factors), of each view (features, factors), and (views, factors) shares of variance, by mofapy2."""
    before = np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it greets, and seeds the global stream
            entry = _run(people, views, factors=factors, least=least, iterations=iterations, seed=seed)
    finally:
        np.random.set_state(before)
    explained = np.asarray(entry.model.calculate_variance_explained()[0])
    scores = np.asarray(entry.model.nodes["Z"].getExpectation())
    weights = [np.asarray(one["E"]) for one in entry.model.nodes["W"].getExpectations()]
    order = np.argsort(-explained.sum(axis=0), kind="stable")
    signs = np.sign(np.concatenate(weights)[:, order].sum(axis=0))  # either sign fits: the weights' sum is positive
    signs[signs == 0] = 1
    return scores[:, order] * signs, [one[:, order] * signs for one in weights], explained[:, order]


def _run(
    people: Sequence[str], views: Sequence[View], *, factors: int, least: float, iterations: int, seed: int
) -> Any:
    from mofapy2.run.entry_point import entry_point

    entry = entry_point()
    entry.set_data_options(scale_views=True)
    entry.set_data_matrix(
        [[view.values.copy()] for view in views], likelihoods=[view.likelihood for view in views],
        views_names=[view.name for view in views], samples_names=[list(people)],
        features_names=[[f"{view.name}:{name}" for name in view.features] for view in views],
    )  # fmt: skip
    entry.set_model_options(factors=factors, ard_weights=True, ard_factors=False)
    entry.set_train_options(
        iter=iterations, convergence_mode="medium", dropR2=least, seed=seed % 2**31, verbose=False, quiet=True
    )
    entry.build()
    entry.run()
    return entry


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    import pandas as pd

    (item,) = results
    for file in sorted(item.folder.iterdir()):
        if file.suffix == ".parquet" or file.name == EXPLAINED:
            ctx.log_artifact(file, file.name)
    scores = pd.read_parquet(item.folder / FACTORS).to_numpy()
    figures = []
    if scores.shape[1]:
        plots.scatter(scores[:, 0], scores[:, 1 % scores.shape[1]], ctx.out / "factors.png", ("factor 1", "factor 2"))
        figures = [("factors.png", f"The first factors of {len(scores)} people")]
    return Result(dict(item.values), {"factors": float(scores.shape[1])}, figures)


WORKLOAD = Map(plan=plan, run=run, reduce=reduce, version=VERSION)
