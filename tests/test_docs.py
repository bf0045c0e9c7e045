"""The documents are true: their commands run, their tables agree with the code, their links lead somewhere.

A fenced block is run where it is ```console (lines that begin with `$`; what follows is expected, `…` stands for
anything) or ```python. Before a block, `<!-- file: PATH -->` writes it to a file instead, and `<!-- not run: WHY -->`
leaves it alone. The blocks of one page share a folder and a home; the word JOB stands for the job submitted last.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined
from typer.main import get_command

from permed_compute.cli.app import app
from permed_compute.cli.exits import MEANING
from permed_compute.paths import HomePaths
from permed_compute.settings import Settings
from permed_compute.spec import DataRef, JobSpec, Resources, format_duration, format_memory

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(ROOT / name / "README.md" for name in ("jobs", "models", "cluster")),
    ]
)
_BLOCK = re.compile(r"(?:<!-- (file|not run): (.*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    mark: str
    about: str
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*(found or "" for found in match)) for match in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def runs(block: Block) -> bool:
    return block.mark != "not run" and block.kind in ("console", "python")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(runs, blocks(page)))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_what_a_page_tells_to_type_works(page: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PERMED_HOME": str(home),
        "PERMED_EXECUTOR": "inprocess", "PERMED_TRACKING_URI": "none", "PERMED_ANCHOR": str(tmp_path / "anchor"),
        "PERMED_CPUS": "2",
    }  # fmt: skip
    folder = tmp_path / "here"
    folder.mkdir()
    try:
        for block in blocks(page):
            if block.mark == "file":
                file = folder / block.about
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text)
            elif runs(block) and block.kind == "python":
                _run([sys.executable, "-c", block.text], folder, environment)
            elif runs(block):
                for command, expected in console(block.text):
                    out = _run(["bash", "-c", _with_job(command, folder, environment)], folder, environment)
                    for line in expected:
                        assert _pattern(line).search(out), f"{command} did not say {line!r} but:\n{out}"
    finally:
        shutil.rmtree(HomePaths(home).runtime, ignore_errors=True)


def console(text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, lines it is expected to say)."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *said = part.splitlines()
        yield command, [line for line in said if line.strip()]


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command[-1]}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _with_job(command: str, folder: Path, environment: dict[str, str]) -> str:
    if not re.search(r"\bJOB\b", command):
        return command
    import json

    newest = json.loads(_run(["permed", "jobs", "--all", "--limit", "1", "--json"], folder, environment))[0]["id"]
    return re.sub(r"\bJOB\b", newest, command)


def _pattern(line: str) -> re.Pattern[str]:
    """The line with `…` for anything and any number of spaces between words."""
    pieces = [r"\s+".join(map(re.escape, piece.split())) for piece in line.split("…")]
    return re.compile(r".*?".join(pieces), re.DOTALL)


# ------------------------------------------------------------------------------------------- tables


def settings_table() -> str:
    rows = [
        f"| `{item.name}` | {_shown(item.default)} | `PERMED_{item.name.upper()}` | {item.metadata['help']} |"
        for item in fields(Settings)
        if item.name != "source"
    ]
    return "\n".join(["| setting | default | environment | meaning |", "|---|---|---|---|", *rows])


def exit_table() -> str:
    return "\n".join(
        ["| code | when |", "|---|---|", *(f"| {code.value} | {text} |" for code, text in MEANING.items())]
    )


def job_table(model: type) -> str:
    """Keys of a part of a job file: name, default as one would write it, what it means."""
    rows = []
    for name, field in model.model_fields.items():
        default = "*needed*" if field.default is PydanticUndefined and not field.default_factory else ""
        default = default or _shown(_written(name, field.get_default(call_default_factory=True)))
        rows.append(f"| `{name}` | {default} | {field.description or _MORE[name]} |")
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


_MORE = {
    "version": "of this format",
    "legal_entity": "who answers for the data",
    "band": "`clinical`, `research` or `opportunistic`: who comes first",
    "purpose": "`care`, `quality` or `research`; research results are marked as such",
    "data_class": "`green` open, `yellow` internal, `red` personal health data, `black` strictly protected",
    "inputs": "files and folders, read only, where they stand: paths, or `{name: …, path: …}`",
    "params": "what the workload takes; part of every part's key",
    "resources": "what each worker needs, see below",
    "array": "a number, or a list of params: one job per element",
    "seed": "of all random numbers, recorded in the manifest",
    "urgency": "only `planned`: acute work is refused, because a shared queue promises no answer within minutes",
    "workers": "`4`, or `1..8` for a job that takes what is free; the smaller number starts together or not at all",
}


def _written(name: str, value: object) -> object:
    if name in ("memory", "gpu_memory") and isinstance(value, int):
        return format_memory(value) if value else 0
    if name == "time_limit" and isinstance(value, int):
        return format_duration(value)
    if isinstance(value, Resources):
        return ""
    if name == "workers":
        return "1"
    return getattr(value, "value", value)


def _shown(value: object) -> str:
    return f"`{value}`" if value not in ("", None, (), {}) else ""


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("settings.md", settings_table()),
        ("exit-codes.md", exit_table()),
        ("job.md", job_table(JobSpec)),
        ("job.md", job_table(Resources)),
        ("job.md", job_table(DataRef)),
    ],
    ids=["settings", "exit codes", "job", "resources", "inputs"],
)
def test_reference_tables_are_the_codes_own(page: str, table: str) -> None:
    assert table in (REFERENCE / page).read_text(encoding="utf-8"), f"{page} should have:\n{table}"


def commands(command: object, path: str = "permed") -> Iterator[str]:
    below = getattr(command, "commands", {})
    if not below:
        yield path
    for name, sub in below.items():
        yield from commands(sub, f"{path} {name}")


@pytest.mark.parametrize("command", list(commands(get_command(app))))
def test_every_command_is_documented(command: str) -> None:
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")
    assert re.search(rf"\*\*`{command}\b", page), f"docs/reference/commands.md does not explain {command}"


# ------------------------------------------------------------------------------------------- links and claims


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    for record in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert record.name in listed
        text = record.read_text(encoding="utf-8")
        assert "**Do.**" in text and "**Why.**" in text and "**Rejected.**" in text


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"\bmake ([a-z-]+)", page.read_text(encoding="utf-8").replace("make and", ""))) <= targets
