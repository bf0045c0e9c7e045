"""Backup and restore. A SQLite queue is copied by SQLite's online backup, a PostgreSQL queue dumped as JSON lines.

Both are one consistent state of the queue, taken while jobs move, and either restores into either kind of database.
JSON lines: a header {"format", "revision"}, then {"table", "row"} per row, then {"rows": how many}, without which the
file is incomplete.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from permed_compute.errors import QueueError
from permed_compute.paths import replacing
from permed_compute.queue import schema

_FORMAT = "permed-queue-backup"
_ROWS_PER_INSERT = 1000

Rows = Iterator[tuple[str, dict[str, Any]]]


def write(engine: sa.Engine, target: str) -> str:
    """Copy the queue to the file `target`, which appears whole or not at all; returns what was written and where."""
    file = Path(target)
    try:
        with replacing(file) as temporary:
            kind = _copy(engine, temporary) if engine.dialect.name == "sqlite" else _dump(engine, temporary)
        size = file.stat().st_size
    except OSError as error:
        raise QueueError(f"The backup {file} cannot be written ({error.strerror}).") from None
    return f"{kind}, {size} bytes: {file.resolve()}"


def restore(source: str, url: str | sa.URL) -> str:
    """Fill the empty database at `url` from a backup, upgraded to this version; returns what was restored.

    Raises `QueueError` for a target that holds a queue already, and for an incomplete backup; the target is then
    unchanged.
    """
    parsed = sa.make_url(url)
    try:
        if parsed.get_backend_name() != "sqlite":
            return _fill(parsed, Path(source))
        file = Path(str(parsed.database))
        if file.exists() and file.stat().st_size:
            raise _not_empty()
        with replacing(file) as temporary:
            done = _fill(schema.sqlite_url(temporary), Path(source))
            _into_one_file(temporary)
        return done
    except OSError as error:
        raise QueueError(f"The backup cannot be restored ({error.strerror}).") from None


# --------------------------------------------------------------------------------------------- writing


def _copy(engine: sa.Engine, file: Path) -> str:
    with closing(_open_read_only(Path(str(engine.url.database)))) as source, closing(sqlite3.connect(file)) as copy:
        source.backup(copy)
    _into_one_file(file)
    return "SQLite copy"


def _open_read_only(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)


def _into_one_file(file: Path) -> None:
    """Leave WAL mode, so that the file needs no companion."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


def _dump(engine: sa.Engine, file: Path) -> str:
    rows = 0
    with file.open("w", encoding="utf-8") as out, engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ", stream_results=True, yield_per=_ROWS_PER_INSERT)
        _line(out, {"format": _FORMAT, "revision": schema.revision_of(connection)})
        for table in schema.TABLES:
            for row in connection.execute(sa.select(table)).mappings():
                _line(out, {"table": table.name, "row": dict(row)})
                rows += 1
        _line(out, {"rows": rows})
    return f"dump of {rows} rows"


def _line(out: Any, value: Any) -> None:
    out.write(json.dumps(value, ensure_ascii=True) + "\n")


# --------------------------------------------------------------------------------------------- reading


def _fill(url: sa.URL, source: Path) -> str:
    engine = schema.engine_for(url)
    try:
        with engine.connect() as connection, schema.writing(connection).begin():
            if schema.revision_of(connection) is not None:
                raise _not_empty()
            revision, rows = _read(source)
            schema.upgrade(connection, revision)
            count = 0
            for name, group in groupby(rows, key=lambda row: row[0]):
                while page := [values for _, values in islice(group, _ROWS_PER_INSERT)]:
                    table = sa.table(name, *(sa.column(column) for column in page[0]))
                    connection.execute(sa.insert(table), page)
                    count += len(page)
            schema.upgrade(connection)
    except sa.exc.SQLAlchemyError as error:
        raise QueueError(f"The backup cannot be restored ({type(error).__name__}).") from error
    finally:
        engine.dispose()
    return f"{count} rows of a queue at revision {revision}"


def _read(source: Path) -> tuple[str, Rows]:
    """The backup's revision and its rows, tables in order."""
    with source.open("rb") as file:
        start = file.read(16)
    if start == b"SQLite format 3\0":
        return _read_copy(source)
    return _read_dump(source)


def _read_copy(source: Path) -> tuple[str, Rows]:
    def rows() -> Rows:
        with closing(_open_read_only(source)) as connection:
            connection.row_factory = sqlite3.Row
            for table in schema.TABLES:
                for row in connection.execute(f"SELECT * FROM {table.name} ORDER BY 1"):  # noqa: S608 - our own name
                    yield table.name, dict(row)

    try:
        with closing(_open_read_only(source)) as connection:
            [revision] = connection.execute(f"SELECT version_num FROM {schema.VERSION_TABLE}").fetchone()  # noqa: S608
    except (sqlite3.Error, TypeError):
        raise QueueError(f"{source} is not a backup of a queue.") from None
    return revision, rows()


def _read_dump(source: Path) -> tuple[str, Rows]:
    def lines() -> Iterator[dict[str, Any]]:
        with source.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def rows() -> Rows:
        count = 0
        try:
            for line in islice(lines(), 1, None):
                if "rows" in line and line["rows"] == count:
                    return
                yield line["table"], line["row"]
                count += 1
        except (KeyError, TypeError, ValueError):
            pass
        raise QueueError(f"The backup {source} is incomplete: it breaks off after {count} rows.")

    try:
        header = next(lines())
        if header["format"] != _FORMAT:
            raise ValueError
        return header["revision"], rows()
    except (KeyError, TypeError, ValueError, StopIteration):
        raise QueueError(f"{source} is not a backup of a queue.") from None


def _not_empty() -> QueueError:
    return QueueError(
        "The target database holds a queue already.", remedy="Restore into a new file, or into an empty database."
    )
