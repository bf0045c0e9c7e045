"""The documentation that MDR Article 5(5) (Regulation (EU) 2017/745) asks of a health institution, from the records.

    declaration.md     (e) the declaration that is made public
    documentation.md   (a)-(d), (f)-(h): transfer, quality system, justification, use, design, performance, review
    card.md  record.json  evidence.json      what they were rendered from
    SHA256SUMS

What no record knows (address, quality system, why no equivalent device will do …) comes from the criteria's
`institution`; where it is missing the text says so in bold, and `rendered` returns its name. Whether the general safety
and performance requirements are met is the institution's to say: these pages show on what it can say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from permed_compute.governance.judge import shown
from permed_compute.paths import replacing

MISSING = "**not stated**"
_ASKED = {
    "name": "(e)(i) the institution's name", "address": "(e)(i) the institution's address",
    "quality_system": "(b) the quality management system",
    "justification": "(c) why no equivalent device on the market will do",
    "requirements": "(e)(iii) which requirements of Annex I are met, and which not, with reasons",
    "review": "(h) who reviews the experience of clinical use, and how often",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rendered:
    """files: name → text. missing: what the institution has still to say."""

    files: Mapping[str, str]
    missing: tuple[str, ...]


def rendered(row: Mapping[str, Any], kept: Mapping[str, Any]) -> Rendered:
    """row: the record (`records.record_row`); kept: its evidence and card (`desk`)."""
    said = row["criteria"]["institution"]
    files = {
        "declaration.md": _declaration(row, said),
        "documentation.md": _documentation(row, said),
        "card.md": kept["card"] or f"The model came without a card: {MISSING}.\n",
        "record.json": _json(row),
        "evidence.json": _json({"evidence": kept["evidence"], "metadata": kept["metadata"]}),
    }
    sums = "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in sorted(files.items()))
    missing = [what for name, what in _ASKED.items() if not said[name]]
    missing += [] if kept["card"] else ["(f) the model's card: design and training data"]
    return Rendered(files | {"SHA256SUMS": sums}, tuple(missing))


def write(made: Rendered, folder: Path) -> None:
    for name, text in made.files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _declaration(row: Mapping[str, Any], said: Mapping[str, str]) -> str:
    use = row["criteria"]["intended_use"]
    return f"""# Declaration for an in-house device

Article 5(5)(e) of Regulation (EU) 2017/745. It is made publicly available.

| | |
|---|---|
| Health institution | {said["name"] or MISSING} |
| Address | {said["address"] or MISSING} |
| Legal entity in our records | {row["entity"]} |
| Device | {row["title"]} |
| Identification | record {row["record"]}; SHA-256 of weights and code `{row["model"]}` |
| Intended purpose | {use["statement"]} |
| Status | {row["standing"]}, valid until {_day(row["expires"])} |

General safety and performance requirements (Annex I): {said["requirements"] or MISSING}
"""


def _documentation(row: Mapping[str, Any], said: Mapping[str, str]) -> str:
    use = row["criteria"]["intended_use"]
    programs = ", ".join(f"{name} {version}" for name, version in sorted(row["packages"].items()))
    code = row["code"]
    commit = f", commit {code['commit'][:12]}{' with changes' if code.get('dirty') else ''}" if "commit" in code else ""
    return f"""# {row["title"]}: documentation

Article 5(5) of Regulation (EU) 2017/745, rendered from record {row["record"]} of the audit log.

## (a) Not transferred to another legal entity

The record is bound to {row["entity"]}. A job for care of any other entity is refused at submission and at launch.

## (b) Quality management system

{said["quality_system"] or MISSING}

## (c) Why no equivalent device will do

{said["justification"] or MISSING}

## (d) Use, for the competent authority

{row["uses"]} launches for care{f", the last on {_day(row['last_use'])}" if row["uses"] else ""}; each is in the audit
log (`care-cleared`). {_life(row)}

## (f) Intended purpose

{use["statement"]} ({use["name"]})

It may be used by {", ".join(f"{name} (output version {version})" for name, version in row["workloads"].items())}, with
the parameters that were validated:

{_params(row)}

## (f) Design and manufacture

Weights and code: SHA-256 `{row["model"]}`. How it was made, from which data, and its limits: [card.md](card.md).
It is run by permed-compute {code.get("version", "")}{commit} with {programs}, on {row["machine"].get("platform", "?")}
({", ".join(row["devices"])}). (g) A file that differs in one byte has another digest and is refused.

## (f) Performance

Job {row["evaluation"]} judged the predictions of job {row["predictions"]}: {row["cases"]} cases of {row["patients"]}
patients, dataset SHA-256 `{row["dataset"]}`. The criteria asked for at least {row["criteria"]["least_patients"]}
patients, and for a group to be judged at least {row["criteria"]["subgroups"]["least_patients"]}.

{_judged(row)}

{_verdict(row)}

## (h) Experience from clinical use

{said["review"] or MISSING}

{_issues(row)}
"""


def _life(row: Mapping[str, Any]) -> str:
    told = [f"Validated by {row['validated_by']} on {_day(row['validated_at'])}"]
    if row["promoted_at"]:
        alone = f" (by the same person, because: {row['own_work']})" if row["own_work"] else ""
        told.append(f"promoted by {row['promoted_by']} on {_day(row['promoted_at'])}{alone}")
    if row["retired_at"]:
        told.append(f"retired on {_day(row['retired_at'])}: {row['why']}")
    return "; ".join(told) + f". Standing now: {row['standing']}; the validation ends on {_day(row['expires'])}."


def _params(row: Mapping[str, Any]) -> str:
    free = row["criteria"]["intended_use"]["free"]
    lines = [f"* `{name}`: `{json.dumps(value)}`" for name, value in sorted(row["params"].items()) if name not in free]
    lines.append("* every other parameter as it is by default")
    if free:
        lines.append(f"* free, because they change nothing of what is computed: {', '.join(free)}")
    return "\n".join(lines)


def _judged(row: Mapping[str, Any]) -> str:
    lines = ["| measure | of whom | patients | value | asked | |", "|---|---|---|---|---|---|"]
    for each in row["judged"]:
        who = f"{each['trait']} {each['group']}" if each["trait"] else "everybody"
        asked = f"at least {each['least']:g}" if each["least"] is not None else f"at most {each['most']:g}"
        value = f"{shown(each['value'])} ({each['of']})"
        verdict = "too few to judge" if each["verdict"] == "few" else each["verdict"]
        lines.append(f"| {each['measure']} | {who} | {each['patients']} | {value} | {asked} | {verdict} |")
    return "\n".join(lines)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["failures"]:
        return "**It failed:**\n\n" + "\n".join(f"* {failure}" for failure in row["failures"])
    few = sorted({f"{each['trait']} {each['group']}" for each in row["judged"] if each["verdict"] == "few"})
    return "It passed." + (f" **Nothing is known of**: {', '.join(few)} (too few patients)." if few else "")


def _issues(row: Mapping[str, Any]) -> str:
    if not row["issues"]:
        return "No issue has been recorded (`permed model issue`)."
    return "\n".join(f"* {_day(at)}, {who}: {text}" for at, who, text in row["issues"])


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
