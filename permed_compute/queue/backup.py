"""Backup and restore. A SQLite queue is copied by SQLite's online backup, a PostgreSQL queue dumped as JSON lines.

Both are one consistent state of the queue, taken while jobs move, and either restores into either kind of database.
JSON lines: a header {"format", "revision"}, then {"table", "row"} per row, then {"rows": how many}, without which the
file is incomplete.

Documents that the log names by digest (evidence and cards of validated models) travel along, read after the queue so
that none is missing: rows of one more table of the copy; {"document", "text"} of each behind the dump's rows.
"""

from __future__ import annotations

import hashlib
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
_DOCUMENTS = "documents"

Rows = Iterator[tuple[str, dict[str, Any]]]


def write(engine: sa.Engine, target: str, kept: Path | None = None) -> str:
    """Copy the queue to the file `target`, which appears whole or not at all; returns what was written and where.

    kept: folder of JSON documents, each named by the digest of what it holds.
    """
    file = Path(target)
    try:
        with replacing(file) as temporary:
            write_one = _copy if engine.dialect.name == "sqlite" else _dump
            kind, along = write_one(engine, temporary, kept)
        size = file.stat().st_size
    except OSError as error:
        raise QueueError(f"The backup {file} cannot be written ({error.strerror}).") from None
    return f"{kind}{f' with {along} documents' if along else ''}, {size} bytes: {file.resolve()}"


def restore(source: str, url: str | sa.URL, kept: Path | None = None) -> str:
    """Fill the empty database at `url` from a backup, upgraded to this version; returns what was restored.

    kept: folder where the backup's documents go. Raises `QueueError` for a target that holds a queue already, for an
    incomplete backup, and for a document that is not what its name says; the target is then unchanged.
    """
    documents = _documents(Path(source))
    done = _restored(source, url)
    for name, text in documents.items() if kept else ():
        assert kept is not None
        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(kept / f"{name}.json") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return f"{done}, {len(documents)} documents" if kept and documents else done


def _restored(source: str, url: str | sa.URL) -> str:
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


def _copy(engine: sa.Engine, file: Path, kept: Path | None) -> tuple[str, int]:
    with closing(_open_read_only(Path(str(engine.url.database)))) as source, closing(sqlite3.connect(file)) as copy:
        source.backup(copy)
    documents = _kept(kept)
    with closing(sqlite3.connect(file)) as connection, connection:
        if documents:
            connection.execute(f"CREATE TABLE {_DOCUMENTS} (name TEXT PRIMARY KEY, text TEXT NOT NULL)")
            connection.executemany(f"INSERT INTO {_DOCUMENTS} VALUES (?, ?)", documents.items())  # noqa: S608 - ours
    _into_one_file(file)
    return "SQLite copy", len(documents)


def _kept(folder: Path | None) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json"))} if folder else {}


def _open_read_only(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)


def _into_one_file(file: Path) -> None:
    """Leave WAL mode, so that the file needs no companion."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


def _dump(engine: sa.Engine, file: Path, kept: Path | None) -> tuple[str, int]:
    rows = 0
    with file.open("w", encoding="utf-8") as out, engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ", stream_results=True, yield_per=_ROWS_PER_INSERT)
        _line(out, {"format": _FORMAT, "revision": schema.revision_of(connection)})
        for table in schema.TABLES:
            for row in connection.execute(sa.select(table)).mappings():
                _line(out, {"table": table.name, "row": dict(row)})
                rows += 1
        documents = _kept(kept)
        for name, text in documents.items():
            _line(out, {"document": name, "text": text})
        _line(out, {"rows": rows})
    return f"dump of {rows} rows", len(documents)


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
                if "document" in line:
                    continue
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


def _documents(source: Path) -> dict[str, str]:
    """By name. Raises `QueueError` for one whose content is another than its name says."""
    try:
        with source.open("rb") as file:
            is_copy = file.read(16) == b"SQLite format 3\0"
        found = _documents_of_copy(source) if is_copy else _documents_of_dump(source)
        wrong = [name for name, text in found.items() if _digest(text) != name]
    except OSError as error:
        raise QueueError(f"The backup cannot be restored ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, sqlite3.Error):
        raise QueueError(f"{source} is not a backup of a queue.") from None
    if wrong:
        raise QueueError(f"{len(wrong)} of the backup's {len(found)} documents are damaged.", remedy="Use another.")
    return found


def _documents_of_copy(source: Path) -> dict[str, str]:
    with closing(_open_read_only(source)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return dict(connection.execute(f"SELECT name, text FROM {_DOCUMENTS}")) if _DOCUMENTS in tables else {}  # noqa: S608


def _documents_of_dump(source: Path) -> dict[str, str]:
    with source.open(encoding="utf-8") as file:
        found = (json.loads(line) for line in file if line.startswith('{"document":'))
        return {row["document"]: row["text"] for row in found}


def _digest(text: str) -> str:
    """As governance names what it keeps: of the content, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def _not_empty() -> QueueError:
    return QueueError(
        "The target database holds a queue already.", remedy="Restore into a new file, or into an empty database."
    )
