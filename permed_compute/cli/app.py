"""The program: global options, all commands, and the one place where errors become words and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

import typer

from permed_compute.cli import (
    admin,
    audit,
    backup,
    catalog,
    controller,
    convert,
    demo,
    doctor,
    far,
    frequency,
    gc,
    jobs,
    logs,
    model,
    quota,
    radiology,
    report,
    results,
    simulate,
    site,
    status,
    submit,
    top,
    transfer,
    validate,
    verify,
)  # fmt: skip
from permed_compute.cli import (
    run as run_file,
)
from permed_compute.cli import (
    via as far_away,
)
from permed_compute.cli.exits import Exit, epilog, of_error
from permed_compute.cli.session import Session, show_error
from permed_compute.errors import PermedError
from permed_compute.offline import silenced

_GLOBAL_FLAGS = {"--json"}
_GLOBAL_OPTIONS = {"--home", "--executor", "--preset", "--site", "--via"}

app = typer.Typer(
    name="permed",
    help="Heavy jobs on images and omics, from a laptop to a shared cluster. `permed demo` shows all of it at once.",
    epilog=epilog(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's help costs 0.13 s (it loads a Markdown parser); plain help keeps `permed --help` well under 0.3 s.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (
    run_file, submit, jobs, status, logs, results, catalog, validate, doctor, demo, controller, backup, gc, convert,
    verify, transfer,
):  # fmt: skip
    part.add_to(app)
top.add_to(app)
admin.add_to(app)
simulate.add_to(app)
app.add_typer(quota.app, name="quota")
app.add_typer(report.app, name="report")
app.add_typer(audit.app, name="audit")
app.add_typer(far.app, name="far", hidden=True)
app.add_typer(frequency.app, name="frequency")
app.add_typer(radiology.app, name="radiology")
app.add_typer(model.app, name="model")
app.add_typer(site.app, name="site")
if find_spec("permed_compute.cli.bench") is not None:
    from permed_compute.cli import bench

    app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from permed_compute import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _globals(
    ctx: typer.Context,
    home: Annotated[str | None, typer.Option(help="Folder of everything durable; default ~/.permed.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer in JSON on stdout; errors in JSON on stderr.")
    ] = False,
    executor: Annotated[str | None, typer.Option(help="`ray` or `inprocess` (for debuggers and tests).")] = None,
    preset: Annotated[str | None, typer.Option(help="Defaults to start from: `permed catalog presets`.")] = None,
    at: Annotated[str | None, typer.Option("--site", help="Site profile: `permed site list`.")] = None,
    via: Annotated[
        str, typer.Option(help="Another machine: ssh:HOST, by your own ssh. Jobs, their files and results go there.")
    ] = "",
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    rest = ctx.obj
    ctx.obj = Session(as_json, {"home": home, "executor": executor, "preset": preset, "site": at}, via)
    if via and rest and rest[0] not in far_away.CARRIES:
        raise typer.Exit(far_away.forward(ctx.obj, rest))


def run(argv: Sequence[str] | None = None) -> int:
    """One command. Our own errors become words and a code; only PERMED_DEBUG shows tracebacks."""
    args = global_options_first(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    os.environ.update(silenced(os.environ))
    try:
        code = app(args, prog_name="permed", standalone_mode=False, obj=_command(args))
        sys.stdout.flush()
    except typer.Abort:
        return Exit.INTERRUPTED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except typer.TyperException as error:
        return _usage(error, as_json=as_json)
    except PermedError as error:
        if os.environ.get("PERMED_DEBUG"):
            raise
        show_error(error, as_json=as_json)
        return of_error(error)
    except BrokenPipeError:
        # `permed jobs | head`: the reader has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    return int(code or 0)


def global_options_first(argv: Sequence[str]) -> list[str]:
    """Global options may stand anywhere (`permed jobs --json`): bring them to the front, where Typer wants them."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif word in _GLOBAL_FLAGS or (name in _GLOBAL_OPTIONS and equals):
            front.append(word)
        elif word in _GLOBAL_OPTIONS:
            front += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            rest.append(word)
    return front + rest


def _command(args: Sequence[str]) -> Sequence[str]:
    """What stands after the global options in front."""
    at = 0
    while at < len(args) and args[at].startswith("-"):
        at += 2 if args[at] in _GLOBAL_OPTIONS else 1
    return args[at:]


def _usage(error: typer.TyperException, *, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "permed"
    if not hasattr(error, "format_message"):
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return Exit.USAGE
    show_error(_UsageError(error.format_message(), remedy=f"{where} --help"), as_json=as_json)
    return Exit.USAGE


class _UsageError(PermedError):
    """The command line itself is wrong."""

    code = "usage"
