"""What travels in a backup beside the queue: documents that the log names by digest, none lost, none changed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from permed_compute.errors import QueueError
from permed_compute.queue.backup import restore
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.testing.queue import a_spec


def keep(folder: Path, *contents: object) -> dict[str, object]:
    folder.mkdir()
    found = {hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest(): each for each in contents}
    for name, each in found.items():
        (folder / f"{name}.json").write_text(json.dumps(each, indent=1))
    return found


def there(folder: Path) -> dict[str, object]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*")}


def backed_up(url: sa.URL, tmp_path: Path) -> tuple[dict[str, object], Path]:
    kept = keep(tmp_path / "models", {"evidence": [0.1, None], "card": "æ"}, {"evidence": []})
    queue = SqlQueue(url)
    try:
        queue.submit([a_spec()], owner="ada")
        assert "with 2 documents" in queue.backup(str(tmp_path / "copy"), tmp_path / "models")
    finally:
        queue.close()
    return kept, tmp_path / "copy"


def test_documents_are_restored_as_they_were(tmp_path: Path) -> None:
    kept, copy = backed_up(sqlite_url(tmp_path / "queue.db"), tmp_path)
    said = restore(str(copy), sqlite_url(tmp_path / "new.db"), tmp_path / "new")
    assert there(tmp_path / "new") == kept and "2 documents" in said


@pytest.mark.postgres
def test_a_dump_carries_them_too_and_one_that_breaks_off_is_refused(
    postgres_urls: Callable[[], sa.URL], tmp_path: Path
) -> None:
    kept, copy = backed_up(postgres_urls(), tmp_path)
    lines = copy.read_text().splitlines(True)
    for cut in (-1, -2):
        (tmp_path / "cut").write_text("".join(lines[:cut]))
        with pytest.raises(QueueError, match="breaks off"):
            restore(str(tmp_path / "cut"), sqlite_url(tmp_path / "new.db"), tmp_path / "new")
        assert not (tmp_path / "new.db").exists()
    restore(str(copy), sqlite_url(tmp_path / "new.db"), tmp_path / "new")
    assert there(tmp_path / "new") == kept


def test_a_changed_document_is_refused_before_anything_is_restored(tmp_path: Path) -> None:
    _, copy = backed_up(sqlite_url(tmp_path / "queue.db"), tmp_path)
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("UPDATE documents SET text = '{}' WHERE rowid = 1")
    with pytest.raises(QueueError, match="1 of the backup's 2 documents"):
        restore(str(copy), sqlite_url(tmp_path / "new.db"), tmp_path / "new")
    assert not (tmp_path / "new.db").exists() and not (tmp_path / "new").exists()


def test_without_documents_a_backup_is_as_it_was(tmp_path: Path) -> None:
    queue = SqlQueue(sqlite_url(tmp_path / "queue.db"))
    try:
        queue.submit([a_spec()], owner="ada")
        assert " documents" not in queue.backup(str(tmp_path / "copy"), tmp_path / "nowhere")
    finally:
        queue.close()
    restore(str(tmp_path / "copy"), sqlite_url(tmp_path / "new.db"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
