"""The one page of a job: what came out, where the time went, on what it ran and why, and what exactly was computed."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from permed_compute.paths import read_json, replacing
from permed_compute.reports.charts import Bar, horizontal_bars
from permed_compute.reports.html import bytesize, number, render, scalars, seconds, when

PAGE = "index.html"

_EMBED_BYTES = 4 * 1024 * 1024
"""Pictures up to this size travel inside the page (it can be mailed); larger ones are linked."""
_MOST = 200
"""Rows shown of any list: a page of 10,000 parts opens on no phone, and result.json has them all."""
_TILES = 12

_TONES = {
    "SUCCEEDED": "good", "DONE": "good", "REUSED": "good", "PARTIAL": "warn", "REFUSED": "warn", "FAILED": "bad",
    "TIMED_OUT": "bad",
}  # fmt: skip
_SEVERITY = {"refused": "bad", "corrected": "warn"}
_NO_RESULT = ("FAILED", "REFUSED")
_KINDS = {
    ".dcm": "DICOM", ".nii": "NIfTI", ".nii.gz": "NIfTI", ".json": "JSON", ".csv": "table", ".parquet": "table",
    ".png": "picture", ".jpg": "picture", ".svg": "picture", ".html": "page", ".txt": "text", ".geojson": "GeoJSON",
}  # fmt: skip


def render_job_page(results: Path) -> Path:
    """Write `results/index.html` from the folder's manifest.json, result.json and files; returns its path.

    Whatever is missing is left out. Nothing on the page names a path of the machine or loads anything from elsewhere.
    """
    manifest = _mapping(read_json(results / "manifest.json"))
    result = _mapping(read_json(results / "result.json"))
    page = render("job.html.j2", **_contents(results, manifest, result))
    with replacing(results / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return results / PAGE


def _contents(results: Path, manifest: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    job, spec = _mapping(manifest.get("job")), _mapping(manifest.get("spec"))
    state = str(result.get("outcome") or job.get("state") or "UNKNOWN")
    parts = [_part(results, row) for row in _rows(result.get("parts"))]
    parts.sort(key=lambda part: part["state"] not in _NO_RESULT)  # what needs a reader's eye stands first
    usage = _mapping(manifest.get("usage"))
    return {
        "name": job.get("name") or spec.get("name") or "Job",
        "state": state,
        "tone": _TONES.get(state, ""),
        "research": (job.get("purpose") or spec.get("purpose")) != "care",
        "subtitle": _subtitle(manifest, job),
        "figures": [figure for row in result.get("figures") or () if (figure := _figure(results, row))],
        "tiles": _key_numbers(result),
        "failed": [part for part in parts if part["state"] in _NO_RESULT],
        "findings": [_finding(row) for row in _all_findings(result)],
        "stages": _stages(_mapping(manifest.get("stages"))),
        "wall": _wall(usage),
        "device": _device(_rows(manifest.get("devices"))),
        "why": manifest.get("why"),
        "usage": _usage(usage),
        "parts": parts,
        "part_count": len(parts),
        "part_summary": ", ".join(f"{count} {state}" for state, count in Counter(p["state"] for p in parts).items()),
        "outputs": _outputs(results),
        "commands": _commands(str(job.get("id") or ""), state),
        "provenance": _provenance(manifest, job),
        "packages": sorted(_mapping(manifest.get("packages")).items()),
        "spec": json.dumps(without_paths(spec), indent=1, ensure_ascii=False) if spec else "",
        "most": _MOST,
        "footer": f"permed_compute {_mapping(manifest.get('code')).get('version') or ''}".strip(),
    }


# --------------------------------------------------------------------------------------------- what came out


def _key_numbers(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The job's own scalars; of a job with one part and none of its own, that part's."""
    values = {name: value for name, value in _mapping(result.get("values")).items() if name != "parts"}
    rows = dict(scalars(values))
    rows |= {name: value for name, value in scalars(_mapping(result.get("metrics"))) if name not in rows}
    parts = _rows(result.get("parts"))
    if not rows and len(parts) == 1:
        rows = dict(scalars(_mapping(parts[0].get("values"))))
    short = [(name, value) for name, value in rows.items() if not isinstance(value, str) or len(value) <= 24]
    return short[:_TILES]


def _figure(results: Path, row: Any) -> dict[str, str] | None:
    """A picture of the folder: inside the page where it is small, else linked. None where there is no such file."""
    name, caption = (*row, "")[:2] if isinstance(row, list | tuple) and row else (row, "")
    file = _inside(results, name)
    if file is None:
        return None
    href = _href(results, file)
    kind = mimetypes.guess_type(file.name)[0] or ""
    if not kind.startswith("image/"):
        return None
    src = href
    if file.stat().st_size <= _EMBED_BYTES:
        src = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"src": src, "href": href, "caption": str(caption or file.name)}


def _part(results: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    state = str(row.get("state") or "")
    files = [file for name in row.get("files") or () if (file := _inside(results, name))]
    return {
        "name": row.get("name") or "",
        "state": state,
        "tone": _TONES.get(state, ""),
        "seconds": row.get("seconds"),
        "reason": row.get("reason"),
        "values": scalars(_mapping(row.get("values")))[:6],
        "findings": len(_rows(row.get("findings"))),
        "refusals": [_finding(told) for told in _rows(row.get("findings")) if told.get("severity") == "refused"],
        "files": [{"name": file.name, "href": _href(results, file)} for file in files],
    }


def _all_findings(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The job's and every part's, each once, the gravest first; a refused part is told of in its own place."""
    rows = [*_rows(result.get("findings"))]
    for part in _rows(result.get("parts")):
        refused = part.get("state") in _NO_RESULT
        rows += [row for row in _rows(part.get("findings")) if not (refused and row.get("severity") == "refused")]
    unique = {json.dumps(row, sort_keys=True, default=str): row for row in rows}
    gravity = {"refused": 0, "corrected": 1}
    return sorted(unique.values(), key=lambda row: gravity.get(str(row.get("severity")), 2))


def _finding(row: Mapping[str, Any]) -> dict[str, Any]:
    severity = str(row.get("severity") or "note")
    return {
        "code": row.get("code") or "",
        "sentence": row.get("sentence") or row.get("code") or "",
        "severity": severity,
        "tone": _SEVERITY.get(severity, ""),
        "about": str(row.get("about") or ""),
        "numbers": scalars(_mapping(row.get("numbers"))),
    }


def _outputs(results: Path) -> list[dict[str, Any]]:
    """Every file of the folder but this page; the job's own before the parts'."""
    files = [path for path in results.rglob("*") if path.is_file() and not path.is_symlink()]
    shown = [path for path in files if path.name != PAGE and not path.name.startswith(".")]
    shown.sort(key=lambda path: (len(path.relative_to(results).parts), path.suffix == ".json", path.as_posix()))
    return [
        {
            "name": path.relative_to(results).as_posix(),
            "href": _href(results, path),
            "kind": next((kind for end, kind in _KINDS.items() if path.name.lower().endswith(end)), ""),
            "size": path.stat().st_size,
        }
        for path in shown
    ]


# --------------------------------------------------------------------------------------------- how it was done


def _subtitle(manifest: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    workload = _mapping(manifest.get("workload"))
    title = " ".join(str(workload[key]) for key in ("name", "version") if workload.get(key))
    started, ended = manifest.get("started_at"), manifest.get("ended_at")
    took = ""
    if isinstance(started, int | float) and isinstance(ended, int | float) and ended >= started:
        took = f"took {seconds((ended - started) / 1000)}"
    account = f"account {job['account']}" if job.get("account") else ""
    return [piece for piece in (title, when(started), took, account) if piece]


def _stages(stages: Mapping[str, Any]) -> str:
    timed = [(str(name), float(value)) for name, value in stages.items() if isinstance(value, int | float)]
    if not timed:
        return ""
    total = sum(value for _, value in timed) or 1.0
    timed.sort(key=lambda row: -row[1])
    bars = [Bar(name, value, f"{seconds(value)} · {100 * value / total:.0f} %") for name, value in timed]
    return horizontal_bars(bars, "Seconds per stage")


def _wall(usage: Mapping[str, Any]) -> str:
    wall = usage.get("wall_s")
    if not isinstance(wall, int | float):
        return ""
    return f"{seconds(wall)} from start to end. Stages of parts that ran beside each other add up to more."


def _device(devices: Sequence[Mapping[str, Any]]) -> str:
    """`2 workers on h100 (GPU 0, GPU 1); 1 worker on CPU`. The node is left out: host names can name people."""
    workers: dict[str, list[str]] = {}
    for row in devices:
        gpus = row.get("devices")
        given = [f"GPU {index}" for index in gpus] if isinstance(gpus, list | tuple) else [str(row.get("device") or "")]
        workers.setdefault(str(row.get("flavor") or ""), []).append(", ".join(given))
    return "; ".join(_workers_on(flavor, given) for flavor, given in workers.items())


def _workers_on(flavor: str, given: Sequence[str]) -> str:
    name = flavor.upper() if flavor in {"cpu", "gpu"} else flavor
    which = ", ".join(dict.fromkeys(device for device in given if device not in ("", flavor)))
    return f"{len(given)} worker{'s' if len(given) > 1 else ''} on {name}" + (f" ({which})" if which else "")


def _usage(usage: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    wall, cpu, peak = (usage.get(key) for key in ("wall_s", "cpu_s", "rss_peak_mib"))
    if isinstance(wall, int | float):
        rows.append(("Wall time", seconds(wall)))
    if isinstance(cpu, int | float):
        busy = f" – {cpu / wall:.1f} cores busy" if isinstance(wall, int | float) and wall > 0 else ""
        rows.append(("CPU time", seconds(cpu) + busy))
    if isinstance(peak, int | float):
        rows.append(("Peak memory", bytesize(peak * 1024 * 1024)))
    known = {"wall_s", "cpu_s", "rss_peak_mib"}
    return rows + [(name, number(value)) for name, value in scalars(usage) if name not in known]


def _provenance(manifest: Mapping[str, Any], job: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    workload, code = _mapping(manifest.get("workload")), _mapping(manifest.get("code"))
    job_rows = [(key, job.get(key)) for key in ("id", "attempt", "band", "purpose", "data_class", "account")]
    made_with = [
        ("workload", workload.get("name")), ("output version", workload.get("version")),
        ("model digest", workload.get("model_digest")), ("own code's digest", workload.get("code")),
        ("spec digest", manifest.get("spec_digest")), ("code version", code.get("version")),
        ("commit", code.get("commit")), ("uncommitted changes", code.get("dirty")), ("seed", manifest.get("seed")),
        ("policy", manifest.get("policy")), ("started", when(manifest.get("started_at"))),
        ("ended", when(manifest.get("ended_at"))),
    ]  # fmt: skip
    inputs: list[tuple[str, Any]] = [
        (str(row.get("name") or "input"), f"{row.get('digest') or ''} · {number(row.get('files', 1))} files")
        for row in _rows(manifest.get("inputs"))
    ]
    tables: list[tuple[str, list[tuple[str, Any]]]] = [
        ("Job", job_rows),
        ("Made with", made_with),
        ("Inputs, by digest", inputs),
        ("Machine", scalars(without_paths(_mapping(manifest.get("machine"))))),
        ("Engine", scalars(without_paths(_mapping(manifest.get("engine"))))),
    ]
    shown = [(title, [(name, number(v)) for name, v in rows if v not in (None, "")]) for title, rows in tables]
    return [(title, rows) for title, rows in shown if rows]


def _commands(job_id: str, state: str) -> list[tuple[str, str]]:
    if not job_id:
        return []
    first = (f"permed results {job_id}", "Where the results are, and what is in them")
    if state in ("SUCCEEDED", "UNKNOWN"):
        return [first, (f"permed logs {job_id}", "What it said on the way"), ("permed catalog", "What else can be run")]
    again = (f"permed resume {job_id}", "Try again; what is done is not computed twice")
    return [again, (f"permed logs {job_id}", "What it said on the way"), first]


def without_paths(value: Any) -> Any:
    """The same JSON with every path hidden: folders are named by people, and sometimes after patients."""
    if isinstance(value, Mapping):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "file:", "./", "../")) or value[1:3] == ":\\"):
        return "(a path)"
    return value


# --------------------------------------------------------------------------------------------- reading safely


def _inside(results: Path, name: Any) -> Path | None:
    """The file of that relative name, only where it truly lies in the folder."""
    if not isinstance(name, str) or not name:
        return None
    file = (results / name).resolve()
    return file if file.is_file() and file.is_relative_to(results.resolve()) else None


def _href(results: Path, file: Path) -> str:
    folder = results.resolve() if file.is_relative_to(results.resolve()) else results
    return quote(file.relative_to(folder).as_posix())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(value: Any) -> Sequence[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, Iterable) else []
