from __future__ import annotations

import threading
from pathlib import Path

from permed_compute.storage.digests import DigestCache
from permed_compute.storage.ledger import Ledger, part_key

SCOPE = ("ous", "helse/crai", "research", "red")


def key(**changes: object) -> str:
    base = {
        "inputs": ("a",),
        "params": {"p": 1},
        "model": "m",
        "workload": "w",
        "version": "1",
        "variant": "v",
        "seed": 0,
    }
    return part_key(**{**base, **changes})


def publish(ledger: Ledger, name: str, text: str, writer: str = "job.1") -> bool:
    folder = ledger.begin(name, writer)
    (folder / "out.txt").write_text(text)
    return ledger.publish(name, folder, {"state": "DONE", "values": {}, "writer": writer})[1]


def test_the_key_depends_on_everything_that_decides_the_output() -> None:
    changes = [{"inputs": ("b",)}, {"inputs": ("a", "a")}, {"params": {"p": 2}}, {"model": "n"}, {"workload": "x"},
               {"version": "2"}, {"variant": "bf16"}, {"seed": 1}]  # fmt: skip
    assert len({key(), *(key(**change) for change in changes)}) == len(changes) + 1
    assert key(params={"a": 1, "b": 2}) == key(params={"b": 2, "a": 1})


def test_published_once_whoever_else_comes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, SCOPE)
    firsts: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: firsts.append(publish(ledger, key(), str(n), f"job.{n}"))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert firsts.count(True) == 1
    entry = ledger.find(key())
    assert entry is not None and (entry.folder / "out.txt").read_text() in set("01234567")
    assert not list((ledger.root / ".new").iterdir())  # nobody left anything behind


def test_scopes_share_nothing(tmp_path: Path) -> None:
    publish(Ledger(tmp_path, SCOPE), key(), "x")
    assert Ledger(tmp_path, ("uio", *SCOPE[1:])).find(key()) is None


def test_a_damaged_entry_counts_as_none_and_can_be_made_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, SCOPE)
    publish(ledger, key(), "x")
    (ledger.folder(key()) / "out.txt").unlink()
    assert ledger.find(key()) is None and publish(ledger, key(), "y")
    (ledger.folder(key()) / "part.json").write_text("{")
    assert ledger.find(key()) is None and publish(ledger, key(), "z")


def test_what_an_attempt_left_half_written_goes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, SCOPE)
    ledger.begin(key(), "job.1")
    ledger.begin(key(), "job.2")
    assert ledger.abandon("job.1") == 1 and len(list((ledger.root / ".new").iterdir())) == 1


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    source, cache = tmp_path / "src", tmp_path / "cache"
    source.mkdir()
    (source / "Nordmann^Kari.dcm").write_bytes(b"one")
    first = DigestCache(cache)
    digest = first.digest(source / "Nordmann^Kari.dcm")
    first.save()
    assert "Nordmann" not in "".join(path.read_text() for path in cache.rglob("*.json"))
    (path,) = cache.rglob("*.json")
    path.write_text(path.read_text().replace(digest, "remembered"))
    assert DigestCache(cache).digest(source / "Nordmann^Kari.dcm") == "remembered"  # read from the cache, not the file
    (source / "Nordmann^Kari.dcm").write_bytes(b"two!")
    assert DigestCache(cache).digest(source / "Nordmann^Kari.dcm") not in (digest, "remembered")
