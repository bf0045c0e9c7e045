"""Batches of a matrix store's rows, read in blocks that lie together: as shuffled as a training needs, at disk speed.

loader = RowLoader(matrix.rows, Blocked(samples, batch=256, seed=1))
for batch in loader: …            one epoch, or the rest of one; the position is `loader.state_dict()`

Blocks come in an order that is another one each epoch; `window` of them are read at once and their rows mixed. With one
window for everything this is a full shuffle; with 64 blocks of 256 rows a batch of 256 has rows of about 63 places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.learning.order import Order
from permed_compute.learning.randomness import derive
from permed_compute.storage.matrices import Rows


@dataclass(frozen=True, slots=True)
class Blocked(Order):
    """Batches out of windows of `window` blocks of `block` rows: a function of (seed, epoch), as any `Order`.

    rows: which rows of the matrix the samples are, sorted; None: all of them, in order.
    """

    block: int = 256
    window: int = 64

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        if self.block < 1 or self.window < 1 or self.block * self.window % self.batch:
            raise WorkloadError(
                f"A window of {self.window} blocks of {self.block} rows is not filled by batches of {self.batch}.",
                remedy="Make block × window a multiple of the batch.",
            )

    def windows(self, epoch: int, first: int = 0) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
        """From the window that holds batch `first` on: its blocks (start, stop), and the order of their rows, which
        number through the blocks; what batches before `first` had is left out of the order."""
        size, count, rest = self.block * self.window, self.samples // self.block, self.samples % self.block
        chance = np.random.default_rng(derive(self.seed, "blocks", epoch))
        blocks, short = chance.permutation(count), int(chance.integers(count + 1))
        # The block that is shorter lies elsewhere each epoch: it is read last, and what fills no batch is not seen.
        starts = blocks * self.block + np.where(blocks >= short, rest, 0)
        for number in range(first * self.batch // size, -(-self.samples // size)):
            some = starts[number * self.window : (number + 1) * self.window]
            pieces = [(int(start), int(start) + self.block) for start in some]
            if rest and (number + 1) * size >= self.samples:
                pieces.append((short * self.block, short * self.block + rest))
            mixed = np.random.default_rng(derive(self.seed, "rows", epoch, number))
            order = mixed.permutation(sum(stop - start for start, stop in pieces))
            yield pieces, order[max(0, first * self.batch - number * size) :]

    def of(self, epoch: int, first: int = 0) -> Iterator[list[tuple[int, int]]]:
        """This rank's share of each batch of the epoch, from batch `first` on, as (epoch, row)."""
        done = first
        for blocks, order in self.windows(epoch, first):
            rows = np.concatenate([np.arange(start, stop) for start, stop in blocks])[order]
            for at in range(0, len(rows) - self.batch + 1, self.batch):
                if done < self.batches:
                    yield [(epoch, int(row)) for row in rows[at : at + self.batch][self.rank :: self.world]]
                    done += 1


class RowLoader:
    """This rank's batches: csr_matrix, or float32 arrays of `columns` where they are given or the matrix is dense.

    kept: the rows of the matrix that the order's samples are, sorted. While one window is worked on, the next is read
    by `threads`; two windows are in memory, no more.
    """

    def __init__(
        self, matrix: Rows, order: Blocked, *, kept: np.ndarray | None = None,
        columns: Sequence[int] | np.ndarray | None = None, threads: int = 2,
    ) -> None:  # fmt: skip
        if (len(kept) if kept is not None else matrix.shape[0]) != order.samples:
            raise WorkloadError(f"The order is of {order.samples} samples; the matrix has {matrix.shape[0]} rows.")
        self.order, self.epoch, self.batch = order, 0, 0
        self._matrix, self._kept, self._threads = matrix, kept, max(1, threads)
        self._columns = None if columns is None else np.asarray(columns, np.int64)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.order.batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches(self.epoch, self.batch):
            self.batch += 1  # before it is handed out: who saves while working on it has had it
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])

    def batches(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """The epoch from batch `first` on."""
        order, done = self.order, first
        with ThreadPoolExecutor(self._threads) as pool, ThreadPoolExecutor(1) as ahead:
            windows = order.windows(epoch, first)
            coming = _next(windows, ahead, pool, self._read)
            while coming is not None:
                taken, mixed = coming[0].result(), coming[1]
                coming = _next(windows, ahead, pool, self._read)
                for at in range(0, len(mixed) - order.batch + 1, order.batch):
                    if done == order.batches:
                        return
                    yield taken(mixed[at + order.rank : at + order.batch : order.world])
                    done += 1

    def _read(self, blocks: Sequence[tuple[int, int]], pool: ThreadPoolExecutor) -> Callable[[np.ndarray], Any]:
        """What gives rows of these blocks by their numbers through them."""
        pieces = blocks if self._kept is None else [_span(self._kept[a:b]) for a, b in blocks]
        inside = None
        if self._kept is not None:  # read from the first to the last row of a block, then leave out what is not kept
            offsets = np.cumsum([0, *(b - a for a, b in pieces)])
            inside = np.concatenate(
                [self._kept[a:b] - piece[0] + at for (a, b), piece, at in zip(blocks, pieces, offsets, strict=False)]
            )
        give = self._sparse(pieces, pool) if self._matrix.is_sparse else self._dense(pieces, pool)
        return give if inside is None else lambda rows: give(inside[rows])

    def _dense(self, pieces: Sequence[tuple[int, int]], pool: ThreadPoolExecutor) -> Callable[[np.ndarray], Any]:
        values = np.concatenate(list(pool.map(lambda piece: self._matrix.read(*piece), pieces)))
        columns = self._columns
        return lambda rows: values[rows] if columns is None else values[np.ix_(rows, columns)]

    def _sparse(self, pieces: Sequence[tuple[int, int]], pool: ThreadPoolExecutor) -> Callable[[np.ndarray], Any]:
        matrix = self._matrix
        pointers = matrix.indptr
        lengths = np.concatenate([np.diff(pointers[a : b + 1]) for a, b in pieces])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        data = np.empty(ends[-1], matrix.data.dtype)
        indices = np.empty(ends[-1], matrix.indices.dtype)

        def one(task: tuple[Any, np.ndarray, int, int, int]) -> None:
            array, into, first, last, at = task
            array.read(first, last, into[at : at + last - first])

        tasks, at = [], 0
        for a, b in pieces:
            first, last = int(pointers[a]), int(pointers[b])
            tasks += [(matrix.data, data, first, last, at), (matrix.indices, indices, first, last, at)]
            at += last - first
        list(pool.map(one, tasks))
        width = matrix.shape[1]
        if self._columns is None:
            return lambda rows: _gathered(ends, indices, data, rows, width)
        place = np.full(width, -1, np.int32)
        place[self._columns] = np.arange(len(self._columns))
        count = len(self._columns)

        def dense(rows: np.ndarray) -> np.ndarray:
            out = np.zeros((len(rows), count), np.float32)
            _spread(ends, indices, data, rows, place, out)
            return out

        return dense


def _next(
    windows: Iterator[tuple[list[tuple[int, int]], np.ndarray]], ahead: ThreadPoolExecutor, pool: ThreadPoolExecutor,
    read: Callable[..., Callable[[np.ndarray], Any]],
) -> tuple[Future[Callable[[np.ndarray], Any]], np.ndarray] | None:  # fmt: skip
    found = next(windows, None)
    return None if found is None else (ahead.submit(read, found[0], pool), found[1])


def _span(rows: np.ndarray) -> tuple[int, int]:
    return int(rows[0]), int(rows[-1]) + 1


def _gathered(ends: np.ndarray, indices: np.ndarray, data: np.ndarray, rows: np.ndarray, width: int) -> Any:
    from scipy import sparse

    lengths = ends[rows + 1] - ends[rows]
    pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns, values = np.empty(pointers[-1], np.int32), np.empty(pointers[-1], data.dtype)
    _gather(ends, indices, data, rows, pointers, columns, values)
    made = sparse.csr_matrix((len(rows), width), dtype=data.dtype)
    made.data, made.indices, made.indptr = values, columns, pointers  # as they are: scipy would look at each again
    return made


@numba.njit(nogil=True, cache=True)
def _gather(ends, indices, data, rows, pointers, columns, values):  # type: ignore[no-untyped-def]
    for k in range(len(rows)):
        start, count, to = ends[rows[k]], ends[rows[k] + 1] - ends[rows[k]], pointers[k]
        for j in range(count):
            columns[to + j] = indices[start + j]
            values[to + j] = data[start + j]


@numba.njit(nogil=True, cache=True)
def _spread(ends, indices, data, rows, place, out):  # type: ignore[no-untyped-def]
    for k in range(len(rows)):
        for j in range(ends[rows[k]], ends[rows[k] + 1]):
            column = place[indices[j]]
            if column >= 0:
                out[k, column] = data[j]
