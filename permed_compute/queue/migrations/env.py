"""Alembic's entry: migrates over the connection, and inside the transaction, that `schema.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from permed_compute.queue.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
