"""A PostgreSQL server, one a session, and fresh databases on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from permed_compute.errors import NotFoundError
from permed_compute.testing import postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sa.URL]:
    """URL of the server's own database."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgres.server())
        except NotFoundError as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture
def postgres_url(postgres_server: sa.URL) -> Iterator[sa.URL]:
    """A fresh, empty database, dropped afterwards."""
    with postgres.database(postgres_server) as url:
        yield url


@pytest.fixture
def postgres_urls(postgres_server: sa.URL) -> Iterator[Callable[[], sa.URL]]:
    """As many fresh databases as a test asks for."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(postgres.database(postgres_server))
