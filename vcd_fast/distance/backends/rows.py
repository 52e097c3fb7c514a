"""Rows of projected values sorted, and compared with a target's, on the CPU by as many threads as PyTorch may use.

Done by machine code that numba makes (`compiled`) where numba can be imported (the extra "cpu"), else by NumPy (`ranked`), which takes
several times as long. numba is imported with the first call that has more than a few values to sort or to compare.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from vcd_fast.distance.lists import Lists

THREADED_VALUES = 1 << 18
"""below that many values a second thread takes longer to start than it saves"""
SHARES = 4
"""per thread: whoever is done first takes the next, so that a core that others use too does not hold up the rest"""
COMPILED_VALUES = 1 << 16
"""below that many values sorting them takes less time than importing numba"""

_log = logging.getLogger("vcd_fast")


@functools.cache
def implementation() -> ModuleType:
    """`compiled` or `ranked`."""
    try:
        from vcd_fast.distance.backends import compiled
    except ImportError as error:
        from vcd_fast.distance.backends import ranked

        _log.info("the CPU backend is slower than it could be, numba cannot be imported: %s", error)
        return ranked
    return compiled


def in_threads(work: Callable[[int, int], None], rows: int, values: int) -> None:
    """`work(first, last)` for ranges that make up all rows; `values` is how many they hold together."""
    threads = min(torch.get_num_threads(), rows) if values >= THREADED_VALUES else 1
    if threads < 2:
        work(0, rows)
        return
    shares = min(rows, SHARES * threads)
    edges = [rows * i // shares for i in range(shares + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, edges[:-1], edges[1:]):
            pass


def sort_values(values: Tensor) -> Tensor:
    """A sorted copy of values [.., n]: ascending along the last dimension, NaN last."""
    if values.device.type != "cpu":
        return values.sort(-1).values
    if values.dtype != torch.float32 or values.numel() < COMPILED_VALUES:
        # by SIMD; torch.sort, which also carries indices, takes far longer
        return torch.from_numpy(np.sort(values.numpy(), -1))
    source = values.contiguous().numpy().reshape(-1, values.shape[-1])
    ordered = np.empty_like(source)
    sort = implementation().sort
    in_threads(lambda first, last: sort(source, ordered, first, last), len(source), source.size)
    return torch.from_numpy(ordered).view(values.shape)


def compare(rows: Tensor, fixed: Lists, owners: np.ndarray, offset: int, p: int) -> np.ndarray:
    """sum_j |x_(j) - y_(j)|^p over the full lists of every row; its derivatives replace what the rows hold.

    Args:
        rows: [g, k, m + S or more] contiguous float32: representatives in the form of `fixed`, single values, what is left alone.
        fixed: the target's lists. owners: [g] which of its samples those of `rows` belong to. offset: which of its directions the first
            of `rows` is.

    Returns:
        [g, k] float64. Where values are equal, derivatives are those of one of the possible orders.
    """
    total = np.empty(rows.shape[:2])
    sides = [rows.numpy(), *(part.contiguous().numpy() for part in fixed[:2])]
    compare_rows = implementation().compare

    def work(first: int, last: int) -> None:
        compare_rows(*sides, owners, offset, fixed.form, p, total, first, last)

    in_threads(work, total.size, rows.numel())
    return total
