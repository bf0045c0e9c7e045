"""`permed report usage`: who used what, in hours and in a site's billing units."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session
from permed_compute.errors import SettingsError

app = typer.Typer(no_args_is_help=True, help="Reports over the event log.")


@app.callback()
def _reports() -> None:
    """Keeps `usage` a command of its own, so that others can join it."""


@app.command("usage")
def usage(
    ctx: typer.Context,
    by: Annotated[
        str, typer.Option(help="sector, region, account, flavor, band, owner, month; commas between.")
    ] = "account",
    days: Annotated[int | None, typer.Option(min=1, help="Only the last days; default everything.")] = None,
    site: Annotated[str | None, typer.Option("--billing", help="Bill as this site does, e.g. saga.")] = None,
    partition: Annotated[str, typer.Option(help="Its partition; default its default one.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write .csv, .parquet or .html (by its ending) as well.")] = None,
) -> None:
    """GPU-hours, billing units, lent, borrowed and wasted hours, asked for against used.

    Example: permed report usage --by sector,region,month --out usage.csv
    """
    from permed_compute.admission.billing import tariff
    from permed_compute.admission.policy import Policy
    from permed_compute.admission.usage import spells, table
    from permed_compute.queue.port import wall_clock

    session = Session.of(ctx)
    names = [name.strip() for name in by.split(",") if name.strip()]
    now = wall_clock()
    with session.client() as client:
        events = client.service.events()
        specs = {job.id: job.spec for job in client.service.jobs()}
    since = now - days * 86_400_000 if days else events[0].at if events else now
    policies = [event.data["policy"] for event in events if event.reason == "policy"]
    found = [spell.within(since, now) for spell in spells(events, specs.get, until=now) if spell.end > since]
    rows = table(
        found, names, policy=Policy.from_row(policies[-1]) if policies else None,
        tariff=tariff(site, partition) if site else None,
    )  # fmt: skip
    values = [row.as_dict() for row in rows]
    report = {"by": names, "since": since, "until": now, "site": site or "", "partition": partition, "rows": values}
    if out is not None:
        write(report, out)
    session.answer(report, _shown(values, names), *([str(out.resolve())] if out else []))


def write(report: dict[str, Any], path: Path) -> None:
    """The report by the ending of its file. Raises `SettingsError`."""
    from permed_compute.paths import replacing

    if path.suffix == ".html":
        from permed_compute.reports.simulation import render_usage_page

        render_usage_page(report, path)
        return
    rows = report["rows"]
    if path.suffix == ".csv":
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else report["by"])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise SettingsError(
                "Parquet needs pyarrow, which comes with the extra `tracking`.", remedy="Or write .csv."
            ) from None
        with replacing(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)
    else:
        raise SettingsError(f"{path.name} ends in no format that we write.", remedy="Use .csv, .parquet or .html.")


_COLUMNS = (
    ("gpu_hours", "GPU-H"), ("cpu_hours", "CPU-H"), ("requested_gpu_hours", "ASKED GPU-H"),
    ("requested_cpu_hours", "ASKED CPU-H"), ("wasted_preempted", "PREEMPTED"), ("wasted_failed", "FAILED"),
    ("borrowed", "BORROWED"), ("lent", "LENT"), ("units", "UNITS"), ("pool_gpu_hours", "POOL GPU-H"),
)  # fmt: skip


def _shown(rows: list[dict[str, Any]], names: list[str]) -> Any:
    if not rows:
        return "Nothing has been used yet."
    columns = [pair for pair in _COLUMNS if any(row[pair[0]] for row in rows)]
    table = words.table(*(name.upper() for name in names), "JOBS", *(heading for _, heading in columns))
    for row in rows:
        figures = (f"{row[name]:.2f}" for name, _ in columns)
        table.add_row(*(str(row[name]) for name in names), str(row["jobs"]), *figures)
    return table
