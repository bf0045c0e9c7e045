"""Many rows in few statements, the way each database takes them fastest.

Measured for 10,000 jobs with their events: SQLite's own executemany 0.07 s against 0.25 s through SQLAlchemy's
parameter processing; PostgreSQL from one JSON document per table 0.25 s against 0.6 s row by row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

Rows = Sequence[dict[str, Any]]


def insert(connection: sa.Connection, rows_of: Mapping[sa.Table, Rows]) -> None:
    """Insert rows, each with a value for every column of its table.

    A row that is there already stays where the table's info says `by_digest`, and is an error elsewhere.
    """
    filled = {table: rows for table, rows in rows_of.items() if rows}
    if connection.dialect.name == "postgresql":
        _insert_documents(connection, filled)
        return
    for table, rows in filled.items():
        columns = ", ".join(f'"{name}"' for name in table.c.keys())  # noqa: SIM118 - a collection of columns
        values = ", ".join(f":{name}" for name in table.c.keys())  # noqa: SIM118
        statement = f"INSERT INTO {table.name} ({columns}) VALUES ({values}){_conflict(table)}"  # noqa: S608 - our own names
        connection.exec_driver_sql(statement, list(rows))


def update(connection: sa.Connection, table: sa.Table, key: str, rows: Rows) -> None:
    """Set, in the row with the same `key`, what each row holds beside it; all rows have the same columns."""
    if not rows:
        return
    names = [name for name in rows[0] if name != key]
    if connection.dialect.name == "postgresql":
        change = ", ".join(f"{name} = new.{name}" for name in names)
        where = f"{table.name}.{key} = new.{key}"
        connection.exec_driver_sql(
            f"UPDATE {table.name} SET {change} FROM {_document(table)} new WHERE {where}",  # noqa: S608
            (json.dumps(rows),),
        )
    else:
        change = ", ".join(f"{name} = :{name}" for name in names)
        connection.exec_driver_sql(f"UPDATE {table.name} SET {change} WHERE {key} = :{key}", list(rows))  # noqa: S608


def _insert_documents(connection: sa.Connection, filled: Mapping[sa.Table, Rows]) -> None:
    """All tables in one statement: one round trip."""
    inserts = [f"INSERT INTO {table.name} SELECT * FROM {_document(table)}{_conflict(table)}" for table in filled]  # noqa: S608
    if not inserts:
        return
    *others, last = inserts
    common = ", ".join(f"t{number} AS ({statement})" for number, statement in enumerate(others))
    statement = f"WITH {common} {last}" if others else last
    connection.exec_driver_sql(statement, tuple(json.dumps(rows) for rows in filled.values()))


def _document(table: sa.Table) -> str:
    return f"json_populate_recordset(NULL::{table.name}, %s::json)"


def _conflict(table: sa.Table) -> str:
    return " ON CONFLICT DO NOTHING" if table.info.get("by_digest") else ""
