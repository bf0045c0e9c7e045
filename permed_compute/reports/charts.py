"""Small inline SVG charts. They have no width in pixels: lengths are percentages and type has a fixed size, so that a
chart is as readable on a phone as on a wall. Colours are the page's CSS variables, so dark mode needs no second chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_ROW, _BAR, _HEAD = 38, 10, 34


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its length `value`, the words at its right end, and (grouped bars) its spread and tone.

    low, high: ends of the whisker, in the unit of `value`; None = no whisker. tone: `accent` (ours) or `peer`.
    """

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    tone: str = "accent"


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that share a scale from zero: ours and its peers on one measurement. `note` stands at the right."""

    title: str
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve over a shared horizontal axis. tone: `accent` (ours) or `peer`."""

    label: str
    values: Sequence[float]
    tone: str = "accent"


_PLOT = 150


def curves(lines: Sequence[Line], title: str, *, left: str, right: str, unit: str) -> Markup:
    """Curves one under the other on one scale from zero, each filled below. `left`, `right`: ends of the axis."""
    top_value = max((max(line.values, default=0.0) for line in lines), default=0.0) or 1.0
    drawn, top = [], 0
    for line in lines:
        drawn.append(_curve(line, top, top_value, f"peak {max(line.values, default=0.0):.4g} {unit}".strip()))
        top += _PLOT // 2 + 44
    drawn.append(
        Markup(
            '<text class="note" x="0" y="{y}">{left}</text>'
            '<text class="note" x="100%" y="{y}" text-anchor="end">{right}</text>'
        ).format(y=top + 4, left=left, right=right)
    )
    return _svg(title, drawn, top + 14)


def _curve(line: Line, top: int, scale: float, note: str) -> Markup:
    count, height = max(2, len(line.values)), _PLOT // 2
    points = " ".join(
        f"{1000 * place / (count - 1):.1f},{100 - 100 * value / scale:.2f}" for place, value in enumerate(line.values)
    )
    return Markup(
        '<text x="0" y="{text_y}">{label}</text>'
        '<text class="value" x="100%" y="{text_y}" text-anchor="end">{note}</text>'
        '<svg x="0" y="{y}" width="100%" height="{height}" viewBox="0 0 1000 100" preserveAspectRatio="none">'
        '<rect class="track" width="1000" height="100"/>'
        '<polygon class="bar {tone}" points="0,100 {points} 1000,100"/></svg>'
    ).format(
        text_y=top + 16, label=line.label, note=note, y=top + 24, height=height, tone=line.tone, points=points
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """A curve that holds its value until the next time: 1 before the first. tone: `accent`, `peer`, `warn` or `bad`."""

    label: str
    time: Sequence[float]
    value: Sequence[float]
    note: str = ""
    tone: str = "accent"


def steps(lines: Sequence[Step], title: str, *, unit: str = "") -> Markup:
    """Step curves over each other from 0 to 1 (Kaplan–Meier), with a legend below; each has its own colour and dash."""
    last = max((max(line.time, default=0.0) for line in lines), default=0.0) or 1.0
    height = 2 * _PLOT
    plot = Markup("").join(
        Markup('<polyline class="line {tone}" points="{points}" vector-effect="non-scaling-stroke"/>').format(
            tone=line.tone, points=_stairs(line, last)
        )
        for line in lines
    )
    drawn = [
        Markup('<text class="note" x="0" y="12">1</text><text class="note" x="0" y="{y}">0</text>').format(
            y=height + 8
        ),
        Markup(
            '<svg x="16" y="4" width="98%" height="{height}" viewBox="0 0 1000 100" preserveAspectRatio="none">'
            '<rect class="track" width="1000" height="100"/>{plot}</svg>'
        ).format(height=height, plot=plot),
        Markup('<text class="note" x="100%" y="{y}" text-anchor="end">{last}</text>').format(
            y=height + 24, last=f"{last:.4g} {unit}".strip()
        ),
    ]
    for k, line in enumerate(lines):
        y = height + 24 + 24 * k
        drawn.append(
            Markup(
                '<line class="line {tone}" x1="16" x2="56" y1="{mid}" y2="{mid}"/>'
                '<text x="66" y="{y}">{label} <tspan class="value">{note}</tspan></text>'
            ).format(tone=line.tone, mid=y - 5, y=y, label=line.label, note=line.note)
        )
    return _svg(title, drawn, height + 24 * len(lines) + 12)


def _stairs(line: Step, last: float) -> str:
    points, level = ["0,0"], 1.0
    for time, value in zip(line.time, line.value, strict=True):
        x = 1000 * time / last
        points += [f"{x:.1f},{100 - 100 * level:.2f}", f"{x:.1f},{100 - 100 * value:.2f}"]
        level = value
    return " ".join(points)


def horizontal_bars(bars: Sequence[Bar], title: str) -> Markup:
    """One bar under the other on one scale from zero. `title` is what a screen reader says first."""
    return _svg(title, [_rows(bars, top=0, scale=_longest(bars))], len(bars) * _ROW)


def grouped_bars(groups: Sequence[Group], title: str) -> Markup:
    """Groups one under the other, each on its own scale, with min–max whiskers."""
    drawn: list[Markup] = []
    top = 0
    for group in groups:
        drawn.append(
            Markup('<text class="group" x="0" y="{y}">{title}</text>').format(y=top + 20, title=group.title)
            + Markup('<text class="note" x="100%" y="{y}" text-anchor="end">{note}</text>').format(
                y=top + 20, note=group.note
            )
        )
        drawn.append(_rows(group.bars, top=top + _HEAD - 6, scale=_longest(group.bars)))
        top += _HEAD + len(group.bars) * _ROW + 8
    return _svg(title, drawn, top)


def _longest(bars: Sequence[Bar]) -> float:
    return max((max(bar.value, bar.high or 0.0) for bar in bars), default=0.0) or 1.0


def _rows(bars: Sequence[Bar], *, top: int, scale: float) -> Markup:
    return Markup("").join(_row(bar, top + index * _ROW, scale) for index, bar in enumerate(bars))


def _row(bar: Bar, top: int, scale: float) -> Markup:
    y = top + 20
    row = Markup(
        '<text x="0" y="{text_y}">{label}</text>'
        '<text class="value" x="100%" y="{text_y}" text-anchor="end">{text}</text>'
        '<rect class="track" x="0" y="{y}" width="100%" height="{h}" rx="3"/>'
        '<rect class="bar {tone}" x="0" y="{y}" width="{width:.2f}%" height="{h}" rx="3"/>'
    ).format(
        text_y=top + 14,
        label=bar.label,
        text=bar.text,
        tone=bar.tone,
        y=y,
        h=_BAR,
        width=_percent(bar.value, scale),
    )
    if bar.low is not None and bar.high is not None:
        low, high = _percent(bar.low, scale), _percent(bar.high, scale)
        row += Markup(
            '<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{mid}" y2="{mid}"/>'
            '<line class="whisker" x1="{low:.2f}%" x2="{low:.2f}%" y1="{a}" y2="{b}"/>'
            '<line class="whisker" x1="{high:.2f}%" x2="{high:.2f}%" y1="{a}" y2="{b}"/>'
        ).format(low=low, high=high, mid=y + _BAR / 2, a=y + 1, b=y + _BAR - 1)
    return row


def _percent(value: float, scale: float) -> float:
    return min(100.0, max(0.0, 100.0 * value / scale))


def _svg(title: str, parts: Sequence[Markup], height: int) -> Markup:
    head = Markup('<svg class="chart" role="img" width="100%" height="{height}"><title>{title}</title>').format(
        height=max(height, 1), title=title
    )
    return head + Markup("").join(parts) + Markup("</svg>")
