"""What a CPU does to logits beside the network, compiled by Numba: add windows up, divide by weights, resample, decide.

torch takes a pass over memory for every operation, and its comparisons into bool are not vectorised. Here a value is
read, compared and forgotten: with 25 classes on twice the network's grid this is four times as fast.

Every function releases the GIL and keeps to the range that it is given, so that ranges run beside each other (`shared`)
and the sum of windows has one order whatever the number of threads. Arrays are contiguous float32.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
_BAND_BYTES = 1 << 18
"""Of values that are decided at a time while one class after the other passes: they stay in a core's own cache."""


def _compiled(**more: Any) -> Callable[[Kernel], Kernel]:
    """Once per machine; per process where no folder for compiled code can be written (a container)."""

    def decorate(function: Kernel) -> Kernel:
        try:
            return cast(Kernel, njit(nogil=True, cache=True, **more)(function))
        except RuntimeError:
            return cast(Kernel, njit(nogil=True, **more)(function))

    return decorate


def shared(kernel: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """`kernel(*arguments, a, b)` over 0 … count - 1, in one range for each of torch's threads."""
    threads = max(1, min(torch.get_num_threads(), count))
    if threads == 1:
        return [kernel(*arguments, 0, count)]
    edges = [count * k // threads for k in range(threads + 1)]
    asked = [_pool(threads).submit(kernel, *arguments, a, b) for a, b in pairwise(edges)]
    return [one.result() for one in asked]


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="logits")


@_compiled()
def add(sums: Any, values: Any, weight: Any, z: int, y: int, x: int, a: int, b: int) -> None:  # pragma: no cover
    """sums[c, z …, y …, x …] += values[c] * weight for classes a … b-1; rounded twice, as MONAI's sums are."""
    _, depth, height, width = values.shape
    for c in range(a, b):
        for i in range(depth):
            for j in range(height):
                total, row, share = sums[c, z + i, y + j, x : x + width], values[c, i, j], weight[i, j]
                for k in range(width):
                    total[k] += row[k] * share[k]


@_compiled()
def divide(
    sums: Any, weights: Any, down: int, first: int, last: int, box: tuple[int, int, int, int], a: int, b: int
) -> bool:  # pragma: no cover - compiled
    """sums[c, p] /= weights[p] in the box (y, end, x, end), planes first … last-1, classes a … b-1.

    down: the row of `weights` at which `sums` begins. True where a quotient is NaN or above all numbers.
    """
    top, bottom, left, right = box
    broken = 0
    for c in range(a, b):
        for p in range(first, last):
            for j in range(top, bottom):
                row, weight = sums[c, p, j, left:right], weights[p, j + down, left:right]
                for k in range(right - left):
                    value = row[k] / weight[k]
                    row[k] = value
                    broken += not value < np.inf
    return broken > 0


@_compiled(fastmath={"contract"})
def decide(
    values: Any, number: int, depth: Any, rows: Any, columns: Any, best: Any, found: Any, a: int, b: int
) -> None:  # pragma: no cover - compiled
    """Of classes `number` …, resampled: where one is above `best`, it is the new best, and its number `found`.

    values: (classes, planes, H, W). depth, rows, columns: (low, high, share) per voxel wanted along that axis, int64
    (columns uint32: no test for negative ones) and float32: the value there is low + share * (high - low). best:
    float32, found: int16, both (planes wanted, rows wanted, columns wanted); rows a … b-1 of them are written.
    """
    behind, ahead, deep = depth
    above, below, down = rows
    left, right, across = columns
    base, count, width = behind[0], ahead[-1] - behind[0] + 1, left.size
    band = max(4, _BAND_BYTES // (4 * width * (behind.size + count)))
    wide = np.empty((values.shape[2], width), np.float32)
    tall = np.empty((count, band, width), np.float32)
    for j0 in range(a, b, band):
        j1 = min(j0 + band, b)
        top_row, row_count = above[j0], below[j1 - 1] - above[j0] + 1
        for c in range(values.shape[0]):
            for p in range(count):
                for r in range(row_count):
                    row, out = values[c, base + p, top_row + r], wide[r]
                    for k in range(width):
                        value = row[left[k]]
                        out[k] = value + across[k] * (row[right[k]] - value)
                for j in range(j0, j1):
                    one, two, share, out = wide[above[j] - top_row], wide[below[j] - top_row], down[j], tall[p, j - j0]
                    for k in range(width):
                        out[k] = one[k] + share * (two[k] - one[k])
            code = np.int16(number + c)
            for i in range(behind.size):
                share = deep[i]
                for j in range(j0, j1):
                    one, two = tall[behind[i] - base, j - j0], tall[ahead[i] - base, j - j0]
                    top, name = best[i, j], found[i, j]
                    for k in range(width):
                        value = one[k] + share * (two[k] - one[k])
                        higher = value > top[k]
                        top[k] = value if higher else top[k]
                        name[k] = code if higher else name[k]
