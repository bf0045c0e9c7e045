"""Rows in blocks: every row once an epoch, the same batches wherever it is taken up, and the values of the matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
from scipy import sparse

from permed_compute.errors import WorkloadError
from permed_compute.learning.rows import Blocked, RowLoader
from permed_compute.storage.matrices import Rows, Writer


def counts(rows=1000, features=40, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(0.4, (rows, features)) * (rng.random((rows, features)) < 0.5), dtype=np.int64)


def store(folder, matrix):
    writer = Writer(folder, matrix.shape[1], "uint16" if sparse.issparse(matrix) else "float32",
                    is_sparse=sparse.issparse(matrix), threads=2)  # fmt: skip
    for a in range(0, matrix.shape[0], 170):
        writer.append(matrix[a : a + 170])
    assert writer.close() == matrix.shape[0]
    return Rows(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    matrix = counts()
    matrix[:, 0] = np.arange(1000)[:, None] + 1  # each row knows its number
    return matrix.tocsr(), store(tmp_path_factory.mktemp("rows") / "X", matrix.tocsr())


def numbers(batches):
    return [
        np.asarray(batch[:, [0]].todense() if sparse.issparse(batch) else batch[:, :1]).ravel() for batch in batches
    ]


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(8, 400), block=st.sampled_from([1, 3, 16]), window=st.sampled_from([4, 8, 64]),
    epoch=st.integers(0, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_an_epoch_is_every_row_once_but_what_fills_no_batch(samples, block, window, epoch, seed):
    order = Blocked(samples, 4, seed, block=block, window=window)
    batches = [[row for _, row in batch] for batch in order.of(epoch)]
    rows = [row for batch in batches for row in batch]
    assert len(batches) == samples // 4 and {len(batch) for batch in batches} == {4}
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(samples))
    for first in {0, 1, len(batches) // 2, len(batches) - 1}:
        assert [[row for _, row in batch] for batch in order.of(epoch, first)] == batches[first:]
    assert [[row for _, row in batch] for batch in order.of(epoch + 1)] != batches or samples < 12


def test_the_short_block_is_another_one_each_epoch():
    order = Blocked(11, 4, 0, block=4, window=1)
    left = {next(iter(set(range(11)) - {row for batch in order.of(epoch) for _, row in batch})) for epoch in range(20)}
    assert left == {0, 4, 8}


def test_batches_hold_the_matrix(made):
    matrix, rows = made
    order = Blocked(1000, 50, 7, block=25, window=4)
    sparsely, densely = RowLoader(rows, order), RowLoader(rows, order, columns=[0, 5, 6], threads=1)
    for batch, dense in zip(sparsely, densely, strict=True):
        at = numbers([batch])[0] - 1
        assert (batch != matrix[at]).nnz == 0
        assert dense.dtype == np.float32 and np.array_equal(dense, matrix[at][:, [0, 5, 6]].toarray())
    assert sparsely.state_dict() == {"epoch": 1, "batch": 0}


def test_it_is_taken_up_where_it_was_left(made):
    _, rows = made
    order = Blocked(1000, 50, 7, block=25, window=4)
    whole = numbers(RowLoader(rows, order))
    first, seen = RowLoader(rows, order), []
    for batch in first:
        seen += numbers([batch])
        if len(seen) == 7:
            break
    second = RowLoader(rows, order)
    second.load_state_dict(first.state_dict())
    assert all(map(np.array_equal, seen + numbers(second), whole))


def test_ranks_share_each_batch(made):
    _, rows = made
    whole = numbers(RowLoader(rows, Blocked(1000, 50, 7, block=25, window=4)))
    ranks = [numbers(RowLoader(rows, Blocked(1000, 50, 7, rank, 2, block=25, window=4))) for rank in (0, 1)]
    for all_of_it, one, two in zip(whole, *ranks, strict=True):
        assert sorted([*one, *two]) == sorted(all_of_it)


def test_rows_that_are_left_out_never_come(made):
    _, rows = made
    kept = np.flatnonzero(np.arange(1000) % 3)
    order = Blocked(len(kept), 18, 1, block=9, window=4)
    seen = np.concatenate(numbers(RowLoader(rows, order, kept=kept)))
    assert len(seen) == len(set(seen)) == 18 * (len(kept) // 18) and set(seen - 1) <= set(kept)


def test_dense_rows(tmp_path):
    values = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
    values[3, 4] = np.nan
    values[:, 0] = np.arange(300)
    rows = store(tmp_path / "X", values)
    for columns in (None, [0, 4]):
        for batch in RowLoader(rows, Blocked(300, 20, 0, block=10, window=4), columns=columns):
            wanted = values[batch[:, 0].astype(int)]
            assert np.array_equal(batch, wanted if columns is None else wanted[:, columns], equal_nan=True)


def test_a_window_that_batches_do_not_fill_is_refused(made):
    with pytest.raises(WorkloadError, match="multiple of the batch"):
        Blocked(1000, 48, 0, block=25, window=4)
    with pytest.raises(WorkloadError, match="1000 rows"):
        RowLoader(made[1], Blocked(900, 50, 0, block=25, window=4))
