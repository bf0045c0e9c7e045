"""The hash-chained event log: canonical records, their chain, its verification, and the anchor kept outside the home.

`hash` = SHA-256 over the previous event's hash (64 hex digits; zeros before the first) and the canonical JSON of the
record (every field but `previous` and `hash`; keys sorted, no spaces, ASCII). Whoever edits, removes or reorders a
record breaks the chain from there on; whoever rewrites the rest of the chain, or cuts its tail, disagrees with the
anchor, whose key only this user can read.

What can be lost undetected at most: the anchor is written after commits, about once a second and when the queue
closes. A tail cut after a crash goes unnoticed only where it reaches back no further than the anchor's last writing:
the events of the last second before the crash (`INTERVAL` plus the time of one small write).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from permed_compute.errors import AuditError, QueueError
from permed_compute.paths import read_json, replacing, write_json
from permed_compute.queue.port import Event, Queue, wall_clock

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two writings of the anchor."""

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_text = json.encoder.encode_basestring_ascii


class Tip(NamedTuple):
    """The newest event of a log."""

    seq: int
    hash: str


START = Tip(0, "0" * 64)
"""The tip of an empty log."""

# --------------------------------------------------------------------------------------------- records


def canonical(value: Any) -> str:
    """Canonical JSON of a value that is `plain` already."""
    return _encode(value)


def plain(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping as it reads after storage (keys become text, tuples lists), so that every queue returns the same.

    Raises `QueueError` for what JSON cannot hold (NaN, objects).
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False)) if value else {}
    except (TypeError, ValueError) as error:
        raise QueueError(f"This cannot be stored as JSON: {error}.") from None


def chained(
    tip: Tip, *, at: int, job_id: str, actor: str, action: str, before: str, after: str, reason: str, policy: str,
    data: Mapping[str, Any],
) -> Event:  # fmt: skip
    """The event that follows `tip`. `data` is `plain`."""
    seq = tip.seq + 1
    digest = _digest(tip.hash, seq, at, job_id, actor, action, before, after, reason, policy, data)
    return Event(seq, at, job_id, actor, action, before, after, reason, policy, data, tip.hash, digest)


def digest(event: Event) -> str:
    """What `event.hash` must be if nobody touched the record."""
    e = event
    return _digest(
        e.previous, e.seq, e.at, e.job_id, e.actor, e.action, e.before, e.after, e.reason, e.policy, e.data
    )  # fmt: skip


def _digest(
    previous: str, seq: int, at: int, job_id: str, actor: str, action: str, before: str, after: str, reason: str,
    policy: str, data: Mapping[str, Any],
) -> str:  # fmt: skip
    # Put together by hand, keys in order: the C encoder's set-up would cost more than all the rest of an event.
    record = (
        f'{{"action":{_text(action)},"actor":{_text(actor)},"after":{_text(after)},"at":{at},"before":{_text(before)}'
        f',"data":{canonical(data)},"job_id":{_text(job_id)},"policy":{_text(policy)},"reason":{_text(reason)}'
        f',"seq":{seq}}}'
    )
    return hashlib.sha256((previous + record).encode("ascii")).hexdigest()


# --------------------------------------------------------------------------------------------- the anchor


@dataclass(frozen=True, slots=True)
class Mark:
    """What the anchor says: the log had `seq` events at `at` (ms), and the newest had this hash."""

    seq: int
    hash: str
    at: int


class Anchor:
    """The log's newest hash, kept outside PERMED_HOME under a key that only this user can read.

    `advance` is cheap and may be called after every commit; a thread writes at most once per `INTERVAL`. Where the
    log contradicts the anchor when the queue opens, the anchor stays as it is, so that `permed audit verify` can show
    the contradiction; `accept` moves it on after a restore that somebody answers for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._latest: Tip | None = None
        self._written = START
        self._frozen = False
        self._due = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, base: Path, home: Path) -> Anchor:
        """The anchor of one home below `settings.anchor`."""
        return cls(base / hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:16])

    @property
    def file(self) -> Path:
        return self.folder / "anchor.json"

    @property
    def key_file(self) -> Path:
        return self.folder / "key"

    def read(self) -> Mark | None:
        """The last mark, None before the first. Raises `AuditError` (seq 0) where the anchor itself was touched."""
        try:
            row = read_json(self.file)
            if row is None and not self.key_file.exists():
                return None
            row = row or read_json(self.file)  # both appear at once, perhaps between the two looks
            if row is None:
                raise AuditError(f"The anchor {self.file} is gone, its key is there.", seq=0)
            mark = Mark(int(row["seq"]), str(row["hash"]), int(row["at"]))
            if not hmac.compare_digest(_sign(mark, self.key_file), str(row["hmac"])):
                raise AuditError(f"The anchor {self.file} does not match its key: it has been edited.", seq=0)
        except FileNotFoundError:
            raise AuditError(f"The anchor's key {self.key_file} is gone.", seq=0) from None
        except (KeyError, TypeError, ValueError):
            raise AuditError(f"The anchor {self.file} cannot be read: it has been edited.", seq=0) from None
        return mark

    def begin(self, queue: Queue) -> None:
        """Compare with the log as it stands now; a log that contradicts the anchor does not move it."""
        self._closing.clear()
        self._frozen = False
        try:
            mark = self.read()
            if mark is not None:
                self._written = Tip(mark.seq, mark.hash)
                _compare(queue, mark)
            tip = Tip(*queue.head())
            if tip.seq > self._written.seq:
                self.advance(tip)
        except AuditError as error:
            self._frozen = True
            log.warning("The audit anchor is kept as it is: %s", error)

    def advance(self, tip: Tip) -> None:
        """The log has grown to `tip`, durably."""
        if self._frozen or self._closing.is_set():
            return
        with self._lock:
            if self._latest is None or tip.seq > self._latest.seq:
                self._latest = tip
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_writing, name="permed-anchor", daemon=True)
                self._thread.start()
        self._due.set()

    def accept(self, queue: Queue, *, actor: str, why: str) -> Mark:
        """Take the log as it is now, e.g. after a restore; noted in the log with who answers for it and why."""
        queue.note("anchor-accepted", actor=actor, data={"why": why})
        seq, head = queue.head()
        mark = Mark(seq, head, wall_clock())
        with self._lock:
            self._write(mark)
            self._frozen = False
        return mark

    def close(self) -> None:
        """Write what is still due, and stop."""
        self._closing.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._write_latest()

    def _keep_writing(self) -> None:
        while not self._closing.is_set():
            self._due.wait()
            self._due.clear()
            self._write_latest()
            self._closing.wait(INTERVAL)

    def _write_latest(self) -> None:
        with self._lock:
            tip = self._latest
            if tip is None or tip.seq <= self._written.seq or self._frozen:
                return
            try:
                self._write(Mark(tip.seq, tip.hash, wall_clock()))
            except OSError as error:  # the queue goes on; the next second tries again
                log.warning("The audit anchor could not be written (%s).", error.strerror)

    def _write(self, mark: Mark) -> None:
        if not self.key_file.exists() and not self.file.exists():
            self._create()
        self._publish(mark, self.folder)
        self._written = Tip(mark.seq, mark.hash)

    def _create(self) -> None:
        """Key and first anchor appear together, so that one without the other always means tampering."""
        self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".anchor.") as name:
            new = Path(name) / self.folder.name
            new.mkdir(mode=0o700)
            with replacing(new / self.key_file.name) as key:
                key.write_text(secrets.token_hex(32), encoding="ascii")
            self._publish(Mark(START.seq, START.hash, wall_clock()), new)
            new.rename(self.folder)

    def _publish(self, mark: Mark, folder: Path) -> None:
        row = {"seq": mark.seq, "hash": mark.hash, "at": mark.at, "hmac": _sign(mark, folder / self.key_file.name)}
        write_json(folder / self.file.name, row)


def _sign(mark: Mark, key_file: Path) -> str:
    key = bytes.fromhex(key_file.read_text(encoding="ascii"))
    text = canonical({"seq": mark.seq, "hash": mark.hash, "at": mark.at})
    return hmac.new(key, text.encode("ascii"), "sha256").hexdigest()


# --------------------------------------------------------------------------------------------- verification


@dataclass(frozen=True, slots=True)
class Verified:
    """The log is what was written: `count` events, the newest hashed `head`, known to the anchor up to `anchored_seq`
    (0: there is no anchor yet)."""

    count: int
    head: str
    anchored_seq: int


def verify(queue: Queue, anchor: Anchor | None = None) -> Verified:
    """Recompute the whole chain. Raises `AuditError` whose `seq` is the first record edited, removed or reordered."""
    mark = anchor.read() if anchor is not None else None
    tip = START
    for event in _all(queue):
        _check_next(tip, event)
        tip = Tip(event.seq, event.hash)
        if mark is not None and tip.seq == mark.seq and tip.hash != mark.hash:
            raise _rewritten(mark)
    if mark is not None and tip.seq < mark.seq:
        raise _cut(tip.seq, mark)
    return Verified(tip.seq, tip.hash, mark.seq if mark is not None else 0)


def _all(queue: Queue, page: int = 5000) -> Iterator[Event]:
    after = 0
    while events := queue.events(after=after, limit=page):
        yield from events
        after = events[-1].seq


def _check_next(tip: Tip, event: Event) -> None:
    seq = tip.seq + 1
    if event.seq != seq:
        raise AuditError(f"Event {seq} has been removed: the log goes on with event {event.seq}.", seq=seq)
    own = digest(event) == event.hash
    if event.previous != tip.hash:
        # An intact record that follows another predecessor: the predecessor was edited and hashed anew.
        first = seq - 1 if own and seq > 1 else seq
        raise AuditError(f"Event {first} has been edited or moved: the chain breaks there.", seq=first)
    if not own:
        raise AuditError(f"Event {seq} has been edited: its hash does not match its content.", seq=seq)


def _compare(queue: Queue, mark: Mark) -> None:
    if mark.seq == START.seq:
        return
    found = queue.events(after=mark.seq - 1, limit=1)
    if not found or found[0].seq != mark.seq:
        raise _cut(queue.head()[0], mark)
    if found[0].hash != mark.hash:
        raise _rewritten(mark)


def _cut(seq: int, mark: Mark) -> AuditError:
    return AuditError(
        f"The log ends with event {seq}, but the anchor has seen event {mark.seq}: its tail has been cut off.",
        seq=seq + 1,
        remedy="If a backup was restored on purpose, `permed audit accept` says so in the log.",
    )


def _rewritten(mark: Mark) -> AuditError:
    return AuditError(
        f"Event {mark.seq} is not the one that the anchor has seen: the log was rewritten there or before.",
        seq=mark.seq,
        remedy="If a backup was restored on purpose, `permed audit accept` says so in the log.",
    )
