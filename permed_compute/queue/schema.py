"""The tables as the code sees them, the engines, and the upgrade of an older database in place.

Table names carry `queue_`, because a PostgreSQL database may be shared with others (MLflow has a `jobs` of its own).
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from permed_compute.errors import QueueError
from permed_compute.queue.mounts import refuse_network

REVISION = "0002"
"""The newest migration; a test holds it equal to Alembic's head."""
VERSION_TABLE = "queue_version"
_LOCK = 0x7065726D  # "perm": PostgreSQL's advisory lock that every writer takes first; it keeps the chain linear

_TEXT, _BIG = sa.Text, sa.BigInteger
metadata = sa.MetaData()
specs = sa.Table(
    "queue_specs",
    metadata,
    sa.Column("digest", _TEXT, primary_key=True),
    sa.Column("text", _TEXT),
    info={"by_digest": True},
)
jobs = sa.Table(
    "queue_jobs",
    metadata,
    sa.Column("seq", _BIG, primary_key=True, autoincrement=False),
    *(sa.Column(name, _TEXT) for name in ("id", "spec", "array_id")),
    sa.Column("array_index", sa.Integer),
    sa.Column("state", _TEXT),
    sa.Column("version", sa.Integer),
    sa.Column("owner", _TEXT),
    sa.Column("attempt", sa.Integer),
    sa.Column("reason", _TEXT),
    *(sa.Column(name, _BIG) for name in ("submitted_at", "changed_at", "started_at")),
    sa.Column("detail", _TEXT),
)
events = sa.Table(
    "queue_events",
    metadata,
    sa.Column("seq", _BIG, primary_key=True, autoincrement=False),
    sa.Column("at", _BIG),
    *(sa.Column(name, _TEXT) for name in ("job_id", "actor", "action", "before", "after")),
    *(sa.Column(name, _TEXT) for name in ("reason", "policy", "data", "previous", "hash")),
)
lease = sa.Table(
    "queue_lease",
    metadata,
    sa.Column("epoch", _BIG, primary_key=True, autoincrement=False),
    sa.Column("holder", _TEXT),
    sa.Column("expires_at", _BIG),
)
TABLES = (specs, jobs, events, lease)
_version = sa.Table(VERSION_TABLE, sa.MetaData(), sa.Column("version_num", _TEXT))


def sqlite_url(file: Path) -> sa.URL:
    """The URL of a SQLite file."""
    return sa.URL.create("sqlite", database=str(file))


def engine_for(url: str | sa.URL) -> sa.Engine:
    """An engine for a SQLite file or a PostgreSQL database. Raises `QueueError` for anything else."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise QueueError("queue_url is not a database URL.", remedy=_URLS) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return _sqlite(parsed)
    if backend == "postgresql":
        return _postgresql(parsed)
    raise QueueError(f"A queue cannot live in {parsed.drivername!r}.", remedy=_URLS)


_URLS = "Write sqlite:////absolute/path/queue.db or postgresql+psycopg://user@host/database."


def _sqlite(url: sa.URL) -> sa.Engine:
    file = Path(str(url.database))
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_network(file)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives -wal and -shm the same mode
        file.chmod(0o600)
    except OSError as error:
        raise QueueError(f"The queue's file {file} cannot be opened ({error.strerror}).") from None
    engine = sa.create_engine(url, max_overflow=-1)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # we begin ourselves: Python's sqlite3 would begin too late
        for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), max_overflow=-1, pool_pre_ping=True)
    except ImportError:
        raise QueueError(
            "PostgreSQL's driver is not installed.", remedy="pip install 'permed-compute[server]'"
        ) from None

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        # Whatever the server's default: an acknowledged job is on its disk.
        connection.execute("SET synchronous_commit TO on")
        connection.commit()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get("writes", False):  # one round trip; each statement its own snapshot
            connection.exec_driver_sql(f"BEGIN; SELECT pg_advisory_xact_lock({_LOCK})")

    return engine


def writing(connection: sa.Connection) -> sa.Connection:
    """The connection as one that writes: its transactions exclude each other from their begin on."""
    connection = connection.execution_options(writes=True)
    if connection.dialect.name == "postgresql":  # the driver sends no BEGIN of its own: ours travels with the lock
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
    return connection


def revision_of(connection: sa.Connection) -> str | None:
    """The database's revision, None where no queue is in it."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(sa.select(_version.c.version_num)).scalar()


def upgrade(connection: sa.Connection, to: str = REVISION) -> None:
    """Bring the database to revision `to` within the present transaction: wholly, or not at all.

    Jobs that run meanwhile are rows like any other and go on. Raises `QueueError` for a database that is newer than
    this code.
    """
    present = revision_of(connection)
    if present == to:
        return
    from alembic import command  # 0.2 s, and hardly ever needed
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        raise QueueError(
            f"The queue's database is at revision {present}, newer than this version of permed-compute ({REVISION}).",
            remedy="Install the newer permed-compute, or restore the backup made before the upgrade.",
        )
    command.upgrade(config, to)
