"""A PostgreSQL server of our own, for tests and benchmarks: on a Unix socket in a folder that only its user enters.

Trust is safe there: no TCP, and nobody else reaches the socket. Its durability is PostgreSQL's default (fsync on).
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from permed_compute.errors import EngineError, NotFoundError

_WHERE = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "opt/homebrew/opt/postgresql*/bin")


@contextmanager
def server() -> Iterator[sa.URL]:
    """URL of a running server's own database. Raises `NotFoundError` where the machine lacks what it needs."""
    programs = _programs()
    prefix, user = _as_server_user()
    # Short, because a Unix socket's path is: and outside pytest's folders, which only the test's user may enter.
    folder = Path(tempfile.mkdtemp(prefix="permed-pg-"))
    shutil.chown(folder, user)
    data, log = folder / "data", folder / "log"

    def run(*command: str | Path) -> None:
        done = subprocess.run([*prefix, *map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")

    options = f"-c listen_addresses='' -c max_connections=200 -k {folder}"
    try:
        run(programs / "initdb", "-D", data, "-A", "trust", "-U", user, "-E", "UTF8", "--locale=C")
        run(programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield sa.URL.create("postgresql+psycopg", user, database="postgres", query={"host": str(folder)})
        finally:
            run(programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def database(server_url: sa.URL) -> Iterator[sa.URL]:
    """A fresh, empty database on that server, dropped afterwards."""
    name = f"queue_{secrets.token_hex(6)}"
    engine = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield server_url.set(database=name)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        engine.dispose()


def _programs() -> Path:
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = [
        folder for pattern in _WHERE for folder in sorted(Path("/").glob(pattern)) if (folder / "initdb").exists()
    ]
    if not folders:
        raise NotFoundError(
            "PostgreSQL's server programs are not on this machine.", remedy="Debian: apt-get install postgresql."
        )
    return folders[-1]


def _as_server_user() -> tuple[list[str], str]:
    """(command prefix, user) to run the server by: itself, or as root the user `postgres`, since it refuses root."""
    if os.getuid() != 0:
        return [], pwd.getpwuid(os.getuid()).pw_name
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        raise NotFoundError("PostgreSQL refuses root, and there is no user `postgres` to run it as.") from None
    return ["runuser", "-u", "postgres", "--"], "postgres"
