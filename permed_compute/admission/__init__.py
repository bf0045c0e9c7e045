"""Deciding which waiting job starts where, and saying why the others do not."""
