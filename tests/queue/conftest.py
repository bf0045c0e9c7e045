"""A PostgreSQL server of our own, one a session: on a Unix socket in a temporary folder that only its user enters."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

_WHERE = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")


def _programs() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = [
        folder for pattern in _WHERE for folder in sorted(Path("/").glob(pattern[1:])) if (folder / "initdb").exists()
    ]
    return folders[-1] if folders else None


def _as_server_user() -> tuple[list[str], str]:
    """(command prefix, user) to run the server by: itself, or as root the user `postgres`, since it refuses root."""
    if os.getuid() != 0:
        return [], pwd.getpwuid(os.getuid()).pw_name
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL refuses root, and there is no user `postgres` to run it as")
    return ["runuser", "-u", "postgres", "--"], "postgres"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sa.URL]:
    """URL of the server's own database. Trust is safe: no TCP, and the socket's folder is the server user's alone."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's server programs are not on this machine (Debian: apt-get install postgresql)")
    prefix, user = _as_server_user()
    # Short, because a Unix socket's path is: and outside pytest's folders, which only the test's user may enter.
    folder = Path(tempfile.mkdtemp(prefix="permed-pg-"))
    shutil.chown(folder, user)
    data, log = folder / "data", folder / "log"

    def run(*command: str | Path) -> None:
        done = subprocess.run([*prefix, *map(str, command)], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr}")

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


@pytest.fixture
def postgres_url(postgres_server: sa.URL) -> Iterator[sa.URL]:
    """A fresh, empty database, dropped afterwards."""
    make = _databases(postgres_server)
    yield next(make)
    make.close()


@pytest.fixture
def postgres_urls(postgres_server: sa.URL) -> Iterator[Callable[[], sa.URL]]:
    """As many fresh databases as a test asks for."""
    make = _databases(postgres_server)
    yield lambda: next(make)
    make.close()


def _databases(server: sa.URL) -> Iterator[sa.URL]:
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    names = []
    try:
        while True:
            names.append(f"queue_{secrets.token_hex(6)}")
            with engine.connect() as connection:
                connection.exec_driver_sql(f"CREATE DATABASE {names[-1]}")
            yield server.set(database=names[-1])
    finally:
        with engine.connect() as connection:
            for name in names:
                connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()
