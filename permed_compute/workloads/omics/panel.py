"""Panels of many samples: a sample sheet, the same steps for each sample, a status for each, one summary table.

`inputs`: `sheet`, a CSV with a header (or the data section of an Illumina sample sheet) and the columns Sample_ID and
folder (relative to the sheet: the sample's files), optionally Sample_Type and Pair_ID; optionally `container`, an
image whose digest counts as every sample's input and whose path stands for {container} in commands.

`params` of the job:
    steps   [{name: summary, call: permed_compute.workloads.omics.panel:combined_output}]
            each either `call`, `module:function` of ours or of the job's `code`, or `command`, a list of words in which
            {folder}, {out}, {sample} and {container} stand for the sample's files, where to write, its identifier
            and the image
    limit   1h    of one command

A step's function is called as function(sample) and returns a mapping of numbers and words: columns of the summary.
A command writes such a mapping as `<step name>.json` to {out} if it has any. A command that ends with 65 (EX_DATAERR)
refuses its input for good; any other failure is tried again, and again when the job is run again.

A sample is a part: what was computed is found again as long as its files, the steps and the container are the same.

    SHEET_UNREADABLE DUPLICATE_SAMPLES PANEL_FOLDER_ABSENT PANEL_FILE_ABSENT PANEL_TRUNCATED SAMPLE_MISMATCH
    NOT_A_NUMBER STEP_REFUSED, and `staralleles`'s
"""

from __future__ import annotations

import csv
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from permed_compute.errors import Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.paths import read_json, write_json
from permed_compute.spec import JobSpec, parse_duration
from permed_compute.workloads.omics import staralleles
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "1"
SHEET, CONTAINER = "sheet", "container"
SUMMARY, FHIR = "summary.tsv", "pharmacogenetics.fhir.json"
_DEFAULT = {"name": "summary", "call": f"{__name__}:combined_output"}
_REFUSES = 65
"""EX_DATAERR of sysexits.h: the input is wrong."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a step's function is given. name: as in the sheet, to find files by, never to be logged or returned.

    folder: the sample's files, read only. out: where the step writes; it stands in the results.
    """

    name: str
    pseudonym: str
    kind: str
    pair: str
    folder: Path
    out: Path
    threads: int

    def file(self, pattern: str) -> Path:
        """The one file of that pattern. Raises `RefusedInput` PANEL_FILE_ABSENT."""
        found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        if len(found) != 1:
            raise refuse(
                "PANEL_FILE_ABSENT", f"Sample {self.pseudonym[:12]} has {len(found)} files {pattern}, not one.",
                remedy="Look at the sample's folder.", files=len(found),
            )  # fmt: skip
        return found[0]


def _params(given: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Steps and the limit of a command in seconds. Raises `SpecError` naming every problem."""
    problems = [Problem(f"params.{name}", "is neither steps nor limit.") for name in given if name not in _KNOWN]
    steps, limit = given.get("steps", [_DEFAULT]), 0
    try:
        limit = parse_duration(given.get("limit", "1h"))
    except ValueError as error:
        problems.append(Problem("params.limit", f"{error}."))
    if not isinstance(steps, list) or not steps:
        problems.append(Problem("params.steps", "is no list of steps."))
        steps = []
    problems += [problem for number, step in enumerate(steps) for problem in _problems(number, step)]
    names = [step.get("name") for step in steps if isinstance(step, Mapping)]
    if len(set(names)) != len(names):
        problems.append(Problem("params.steps", "has two steps of one name."))
    if problems:
        raise SpecError("params", problems)
    return [dict(step) for step in steps], limit


_KNOWN = ("steps", "limit")


def _problems(number: int, step: Any) -> list[Problem]:
    where = f"params.steps[{number}]"
    if not isinstance(step, Mapping) or set(step) - {"name", "call", "command"}:
        return [Problem(where, "has other keys than name, and call or command.")]
    if not str(step.get("name", "")).replace("-", "").isidentifier():
        return [Problem(where, "has no name of letters, digits and dashes.")]
    if ("call" in step) == ("command" in step):
        return [Problem(where, "has neither or both of call and command.")]
    if "call" in step and not all(str(step["call"]).partition(":")[::2]):
        return [Problem(f"{where}.call", "is not module:function.")]
    words = step.get("command", ["true"])
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        return [Problem(f"{where}.command", "is no list of words.")]
    return []


# ------------------------------------------------------------------------------------------------ the sheet


def read_sheet(path: Path, pseudonym: Callable[[str], str]) -> dict[str, dict[str, str]]:
    """Rows by the sample's pseudonym, columns by their lower-case names. Raises `RefusedInput` SHEET_UNREADABLE,
    DUPLICATE_SAMPLES."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
    start = next((k for k, line in enumerate(lines) if {"sample_id", "folder"} <= {cell.lower() for cell in line}), -1)
    if start < 0:
        raise refuse("SHEET_UNREADABLE", "The sheet has no line with the columns Sample_ID and folder.")
    header = [cell.lower() for cell in lines[start]]
    rows: dict[str, dict[str, str]] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if not any(line):
            continue
        if line[0].startswith("["):  # the next section of an Illumina sheet
            break
        row = dict(zip(header, line, strict=False))
        if len(line) < len(header) or not row["sample_id"]:
            raise refuse("SHEET_UNREADABLE", f"Row {number} of the sheet lacks cells, or its Sample_ID.", row=number)
        person = pseudonym(row["sample_id"])
        if person in rows:
            raise refuse(
                "DUPLICATE_SAMPLES", f"Rows {numbers[person]} and {number} are of one sample, {person[:12]}.",
                remedy="Give every sample an id of its own.", row=number,
            )  # fmt: skip
        rows[person], numbers[person] = row, number
    if not rows:
        raise refuse("SHEET_UNREADABLE", "The sheet has no samples.")
    return rows


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part for each sample; one whose files are absent is refused by name."""
    parts = _parts(spec, ctx)
    ctx.log(f"{len(parts)} samples")
    return parts


def _parts(spec: JobSpec, ctx: Context) -> list[Part]:
    steps, _ = _params(spec.params)
    sheet = ctx.input(SHEET)
    image = [Path(ref.path) for ref in spec.inputs if ref.name == CONTAINER]
    if not image and any("{container}" in word for step in steps for word in step.get("command", ())):
        raise SpecError("job", [Problem("inputs", "no container, which a command names.")])
    shared = tuple(ctx.digest(path) for path in image)
    parts = []
    with ctx.stage("scan"):
        for person, row in read_sheet(sheet, ctx.pseudonym).items():
            folder = sheet.parent / row["folder"]
            files = sorted(path for path in folder.rglob("*") if path.is_file()) if row["folder"] else []
            given = {
                "steps": steps, "files": len(files), "kind": row.get("sample_type", ""),
                "names": [ctx.pseudonym(str(path.relative_to(folder))) for path in files],
            }  # fmt: skip
            digests = (*shared, *(ctx.digest(path) for path in files))
            parts.append(Part(f"sample-{person[-16:]}", digests, given, (str(folder),), person))
    return parts


# ------------------------------------------------------------------------------------------------ run


def run(part: Part, model: None, ctx: Context) -> PartResult:
    """Every step of one sample; values: the summary's columns and, of each step, that it was done."""
    folder = Path(part.sources[0])
    if not part.params["files"]:
        raise refuse(
            "PANEL_FOLDER_ABSENT", f"Sample {part.subject[:12]} has no folder, or nothing in it.",
            remedy="The sheet's column folder is relative to the sheet.",
        )  # fmt: skip
    row = read_sheet(ctx.input(SHEET), ctx.pseudonym)[part.subject]
    pair = row.get("pair_id", "")
    sample = Sample(
        row["sample_id"], part.subject, str(part.params["kind"]), pair, folder, ctx.out, ctx.threads
    )  # fmt: skip
    columns: dict[str, Any] = {}
    done: list[str] = []
    for step in part.params["steps"]:
        with ctx.stage(step["name"]):
            try:
                made = _call(step, sample) if "call" in step else _command(step, sample, ctx)
            except RefusedInput:
                ctx.log(f"{part.name}: step {step['name']} refused, behind {len(done)} that were done")
                raise
        columns |= made
        done.append(step["name"])
    return PartResult({"columns": columns, "steps": done})


def _call(step: Mapping[str, Any], sample: Sample) -> Mapping[str, Any]:
    module, _, name = step["call"].partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise WorkloadError(
            f"Step {step['name']!r} names {step['call']!r}, which cannot be imported ({type(error).__name__}).",
            remedy="It must be in the job's code folder or an installed package.",
        ) from None
    return _columns(step, function(sample) or {})


def _columns(step: Mapping[str, Any], made: Any) -> dict[str, Any]:
    plain = isinstance(made, Mapping) and all(
        isinstance(name, str) and isinstance(value, str | int | float | bool | None) for name, value in made.items()
    )
    if not plain:
        raise WorkloadError(f"Step {step['name']!r} must return a mapping from names to numbers and words.")
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in made.items()
    }


def _command(step: Mapping[str, Any], sample: Sample, ctx: Context) -> Mapping[str, Any]:
    _, limit = _params(ctx.spec.params)
    image = next((ref.path for ref in ctx.spec.inputs if ref.name == CONTAINER), "")
    places = {"folder": str(sample.folder), "out": str(sample.out), "sample": sample.name, "container": image}
    words = [_filled(word, places) for word in step["command"]]
    with (ctx.scratch / "said.txt").open("wb") as said:
        try:
            ended = subprocess.run(
                words, cwd=sample.out, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, check=False,
                timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise WorkloadError(f"Step {step['name']!r} took longer than {limit} s.") from None
        except OSError as error:
            raise WorkloadError(f"Step {step['name']!r} could not be started ({type(error).__name__}).") from None
    if ended.returncode == _REFUSES:
        raise refuse(
            "STEP_REFUSED", f"Step {step['name']!r} refuses sample {sample.pseudonym[:12]} (it ended with 65).",
            remedy="Run the command by hand to see what it says: that may name people and is not kept.",
        )  # fmt: skip
    if ended.returncode:
        raise WorkloadError(f"Step {step['name']!r} ended with {ended.returncode}.")
    return _columns(step, read_json(sample.out / f"{step['name']}.json") or {})


def _filled(word: str, places: Mapping[str, str]) -> str:
    for name, place in places.items():
        word = word.replace("{" + name + "}", place)
    return word


# ------------------------------------------------------------------------------------------------ TSO 500


def combined_output(sample: Sample) -> dict[str, Any]:
    """Step: what TruSight Oncology 500 says in its CombinedVariantOutput.tsv: TMB, MSI, numbers of variants.

    Raises `RefusedInput`: PANEL_FILE_ABSENT, PANEL_TRUNCATED, SAMPLE_MISMATCH (the file is of another sample: a
    swap), NOT_A_NUMBER.
    """
    sections = _sections(sample.file("*CombinedVariantOutput.tsv"))
    about = sample.pseudonym[:12]
    lacking = [name for name in ("Analysis Details", "TMB", "MSI", "Small Variants") if name not in sections]
    if lacking:
        raise refuse("PANEL_TRUNCATED", f"The output of sample {about} has no section {lacking[0]}.",
                     sections=len(sections))  # fmt: skip
    named = {row[1] for row in sections["Analysis Details"] if row[0] in _IDS and len(row) > 1 and row[1]}
    if not named & {sample.name, sample.pair} - {""}:
        raise refuse("SAMPLE_MISMATCH", f"The output in the folder of sample {about} says that it is another's.",
                     remedy="Samples may have been swapped: look at the run.")  # fmt: skip
    tmb = _figure(sections["TMB"], "Total TMB", about)
    return {
        "tmb_per_mb": tmb,
        "msi_unstable_percent": _figure(sections["MSI"], "Percent Unstable MSI Sites", about),
        "msi_usable_sites": _figure(sections["MSI"], "Usable MSI Sites", about),
        "small_variants": _rows(sections["Small Variants"]),
        "amplifications": _rows(sections.get("Gene Amplifications", [])),
        "fusions": _rows(sections.get("Fusions", [])),
        "splice_variants": _rows(sections.get("Splice Variants", [])),
    }


_IDS = ("DNA Sample ID", "RNA Sample ID", "Pair ID")
_ABSENT = ("", "NA", "N/A")


def _sections(path: Path) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if cells[0].startswith("[") and cells[0].endswith("]"):
            rows = found.setdefault(cells[0][1:-1], [])
        elif any(cells):
            rows.append(cells)
    return found


def _rows(section: Sequence[Sequence[str]]) -> int:
    """Without the header; one line NA stands for none."""
    return sum(row[0] not in _ABSENT for row in section[1:])


def _figure(section: Sequence[Sequence[str]], name: str, about: str) -> float | None:
    text = next((row[1] for row in section if row[0] == name and len(row) > 1), "")
    if text in _ABSENT:
        return None
    try:
        return float(text)
    except ValueError:
        raise refuse("NOT_A_NUMBER", f"{name} of sample {about} is no number.") from None


def star_alleles(sample: Sample) -> dict[str, Any]:
    """Step: a caller's `*staralleles.tsv` as columns of the summary, and as FHIR beside it. Raises `RefusedInput`."""
    found = staralleles.read(sample.file("*staralleles.tsv"))
    write_json(sample.out / FHIR, staralleles.bundle(found, sample.pseudonym))
    return {one.gene: f"{one.diplotype} {one.phenotype}".strip() for one in found}


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """`summary.tsv`: a row for each sample of the sheet, by pseudonym, with its status, reason and columns."""
    by_person = {item.part.subject: item for item in results}
    parts = sorted(_parts(ctx.spec, ctx), key=lambda part: part.subject)
    columns = list(dict.fromkeys(name for item in results for name in item.values["columns"]))
    rows: list[list[Any]] = []
    for part in parts:
        item = by_person.get(part.subject)
        if item is None:
            rows.append([part.subject, "no result", ctx.missed.get(part.name, ""), "", *[""] * len(columns)])
        else:
            shown = [item.values["columns"].get(name) for name in columns]
            steps = ",".join(item.values["steps"])
            rows.append([part.subject, "done", "", steps, *["" if value is None else value for value in shown]])
    with (ctx.out / SUMMARY).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["sample", "status", "reason", "steps", *columns])
        table.writerows(rows)
    missed = [{"sample": row[0], "reason": row[2]} for row in rows if row[1] != "done"]
    values = {"samples": len(rows), "done": len(rows) - len(missed), "without_result": missed}
    return Result(values=values, metrics={"samples": float(len(rows)), "done": float(len(results))})


WORKLOAD = Map(plan=plan, run=run, reduce=reduce, version=VERSION)
