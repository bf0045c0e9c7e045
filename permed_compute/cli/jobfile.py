"""From what a user writes (FILE, --set, --input) to a job spec: options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from permed_compute.spec import JobSpec

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="Job file, or a shipped job's name (`permed catalog jobs`).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the file, e.g. resources.cpus=2. Repeatable."),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="[NAME=]PATH", help="Use these inputs instead of the file's. Repeatable."),
]


def load(file: str, sets: Sequence[str] | None = None, inputs: Sequence[str] | None = None) -> JobSpec:
    """The job of a file, or of the catalogue. Raises `SpecError`, `NotFoundError`."""
    from permed_compute import spec

    return spec.load(find(file), overrides(sets or (), inputs or ()))


def find(file: str) -> Path:
    """The file itself, or the shipped job of that name."""
    path = Path(file)
    if path.is_dir() and (path / "job.yaml").is_file():
        return path / "job.yaml"
    if path.is_file() or path.suffix in (".yaml", ".yml", ".json"):
        return path
    from permed_compute import catalog

    return catalog.job_file(file)


def overrides(sets: Sequence[str], inputs: Sequence[str]) -> dict[str, Any]:
    """`--set` values are YAML (`true`, `0.5`, `[a, b]`); inputs are relative to where the user stands."""
    import yaml

    values: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"--set {text!r}: write KEY=VALUE, e.g. --set resources.cpus=2")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key.strip()] = value
    if inputs:
        values["inputs"] = [_input(text) for text in inputs]
    return values


def _input(text: str) -> dict[str, str]:
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return {"name": name, "path": _where(path)}
    return {"path": _where(text)}


def _where(path: str) -> str:
    return path if path.startswith("transfer:") else str(Path(path).absolute())
