"""Pictures of a result, by Matplotlib without a window. They show distributions, never a person by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INK, _ACCENT, _SECOND, _GRID = "#1d2733", "#0b6e99", "#9aa7b4", "#e3e8ee"


def _axes(width: float = 7.5, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})


def histogram(values: np.ndarray, path: Path, label: str, *, mark: float | None = None, log: bool = False) -> None:
    """How often each value occurs; NaN are left out. `mark`: a threshold to show."""
    figure, axes = _axes()
    values = values[np.isfinite(values)]
    axes.hist(values, bins=min(60, max(10, int(np.sqrt(len(values) or 1)))), color=_ACCENT, log=log)
    if mark is not None:
        axes.axvline(mark, color=_INK, linewidth=1, linestyle="--")
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    _save(figure, path)


def counted(counts: np.ndarray, edges: np.ndarray, path: Path, label: str, *, mark: float) -> None:
    """A histogram that was counted elsewhere, on a log scale."""
    figure, axes = _axes()
    axes.stairs(counts, edges, fill=True, color=_ACCENT)
    axes.set_yscale("log")
    axes.axvline(mark, color=_INK, linewidth=1, linestyle="--")
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    _save(figure, path)


def scatter(x: np.ndarray, y: np.ndarray, path: Path, labels: tuple[str, str]) -> None:
    figure, axes = _axes(5.2, 4.6)
    axes.scatter(x, y, s=5, color=_ACCENT, alpha=0.6, linewidths=0, rasterized=True)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _save(figure, path)


def manhattan(contig: Sequence[str], position: np.ndarray, p: np.ndarray, path: Path) -> None:
    """-log10 p along the genome; of p above 0.01 at most 20,000 evenly spread points are drawn."""
    figure, axes = _axes(9, 3.6)
    names = list(dict.fromkeys(contig))
    names.sort(key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    contigs = np.asarray(contig, object)
    start, ticks = 0.0, []
    for number, name in enumerate(names):
        rows = np.flatnonzero((contigs == name) & np.isfinite(p))
        if not len(rows):
            continue
        weak = rows[p[rows] > 0.01]
        keep = np.concatenate([rows[p[rows] <= 0.01], weak[:: max(1, len(weak) * len(names) // 20_000)]])
        x = start + position[keep]
        axes.scatter(x, -np.log10(np.maximum(p[keep], 1e-300)), s=4, linewidths=0, rasterized=True,
                     color=_ACCENT if number % 2 == 0 else _SECOND)  # fmt: skip
        end = start + float(position[rows].max())
        ticks.append(((start + end) / 2, name))
        start = end
    axes.axhline(-np.log10(5e-8), color=_INK, linewidth=0.8, linestyle="--")
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.set_ylabel("−log10 p")
    _save(figure, path)


def quantiles(p: np.ndarray, path: Path) -> None:
    """Observed against expected -log10 p."""
    figure, axes = _axes(4.6, 4.4)
    seen = np.sort(p[np.isfinite(p) & (p > 0)])
    expected = (np.arange(len(seen)) + 0.5) / max(1, len(seen))
    keep = np.unique(
        np.concatenate([np.arange(min(2000, len(seen))), np.arange(0, len(seen), max(1, len(seen) // 3000))])
    )
    keep = keep.astype(int)
    if len(seen):
        top = -np.log10(expected[0])
        axes.plot([0, top], [0, top], color=_INK, linewidth=0.8)
        axes.scatter(-np.log10(expected[keep]), -np.log10(seen[keep]), s=5, color=_ACCENT, linewidths=0)
    axes.set_xlabel("expected −log10 p")
    axes.set_ylabel("observed −log10 p")
    _save(figure, path)
