"""Pages from templates: one self-contained file, autoescaped, with the words and figures that every page shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader

# The unit is the end of a value's name (`brain_ml`): names are the workloads' own, JSON has no place for a unit.
_UNITS = {
    "ml": "ml", "mm": "mm", "mm2": "mm²", "mm3": "mm³", "um": "µm", "um2": "µm²", "hu": "HU", "deg": "°", "s": "s",
    "ms": "ms", "mib": "MiB", "percent": "%", "pct": "%", "cm": "cm", "cm3": "cm³", "mgy": "mGy", "per_s": "/s",
}  # fmt: skip
_NARROW = "\u202f"  # narrow no-break space between thousands, and between a figure and its unit


def render(template: str, **values: Any) -> str:
    """The page of `templates/<template>` with these values; what is missing renders as nothing."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    loader = PackageLoader("permed_compute.reports", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "amount": amount, "bytesize": bytesize, "label": label, "number": number, "seconds": seconds, "when": when,
    }  # fmt: skip
    return environment


def number(value: Any) -> str:
    """A figure for people: four significant digits below 1,000, one decimal above, none above 10,000."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", _NARROW)
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size and size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        digits = 0 if size >= 10_000 or value == int(value) else 1
        return f"{value:,.{digits}f}".replace(",", _NARROW)
    digits = max(0, 4 - len(str(int(size)))) if size >= 1 else 4
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: Any) -> str:
    """`0.42 s`, `20.1 s`, `2 min 5 s`, `3 h 12 min`."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    if value < 0.9995:
        return f"{value * 1000:.0f}{_NARROW}ms"
    if value < 120:
        return f"{value:.1f}{_NARROW}s"
    minutes, left = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes}{_NARROW}min {left}{_NARROW}s"
    return f"{minutes // 60}{_NARROW}h {minutes % 60}{_NARROW}min"


def bytesize(count: Any) -> str:
    """Bytes as B, KiB, MiB, GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f}{_NARROW}{unit}" if unit == "B" else f"{size:.1f}{_NARROW}{unit}"
        size /= 1024
    return f"{size:.1f}{_NARROW}GiB"


def when(milliseconds: Any) -> str:
    """Milliseconds since 1970 as `2026-11-21 06:00:05 UTC`, '' where there are none."""
    if not isinstance(milliseconds, int | float) or milliseconds <= 0:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def unit_of(name: str) -> tuple[str, str]:
    """`brain_volume_ml` → (`brain_volume`, `ml`); no unit → (name, '')."""
    for suffix, unit in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if name.lower().endswith(f"_{suffix}"):
            return name[: -len(suffix) - 1], unit
    return name, ""


def label(name: str) -> str:
    """`brain_volume_ml` → `Brain volume`, `volumes.brain_ml` → `Volumes: brain`."""
    words = unit_of(name)[0].replace("_", " ").replace(".", ": ").strip()
    return words[:1].upper() + words[1:]


def amount(value: Any, name: str = "") -> str:
    """The figure with the unit that its name ends in."""
    unit = unit_of(name)[1]
    if unit == "s" and isinstance(value, int | float) and not isinstance(value, bool):
        return seconds(value)
    return f"{number(value)}{_NARROW}{unit}" if unit else number(value)


def scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every scalar of a nested mapping with its dotted name, in the order given; longer lists are left out.

    A unit at the end of a mapping's own name (`volumes_ml: {brain: 1403.2}`) holds for what stands in it.
    """
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping):
            group, unit = unit_of(dotted)
            suffix = f"_{dotted[len(group) + 1 :]}" if unit else ""
            rows += [(f"{inner}{suffix}", scalar) for inner, scalar in scalars(value, f"{group}.")]
        elif isinstance(value, str | int | float):
            rows.append((dotted, value))
        elif isinstance(value, list | tuple) and 0 < len(value) <= 4 and not any(isinstance(v, list) for v in value):
            rows.append((dotted, " × ".join(number(item) for item in value)))
    return rows
