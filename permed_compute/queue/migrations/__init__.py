"""Alembic's migrations of the queue's database. Run by `schema.upgrade`, never by the alembic command."""
