"""Rows sorted and compared in NumPy, one after the other: the way to do it without numba (see `rows`), and the plain text of `compiled`.

A row holds m representatives and S single values in the form of `lists.Lists`. Either side's full list is built, the two are subtracted,
and the derivatives find their way back through the order of the representatives.
"""

from __future__ import annotations

import numpy as np

from vcd_fast.distance.lists import Form


def sort(source: np.ndarray, ordered: np.ndarray, first: int, last: int) -> None:
    """Rows first to last of [r, n] in ascending order, NaN last."""
    ordered[first:last] = np.sort(source[first:last], -1)


def full_list(representatives: np.ndarray, singles: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Of ascending values [m] and [S] -> the ascending list [n], and where in it the single values are: behind pairs equal to them."""
    pairs = representatives
    if form == "even":
        pairs = np.repeat(pairs, 2)
    elif form == "odd":
        pairs = np.concatenate([-pairs[::-1], pairs])
    places = np.searchsorted(pairs, singles, "right")
    return np.insert(pairs, places, singles), places + np.arange(len(singles))


def compare(
    values: np.ndarray,
    target: np.ndarray,
    target_singles: np.ndarray,
    owners: np.ndarray,
    offset: int,
    form: Form,
    p: int,
    total: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Compare rows first to last of `values` [g, k, m + S or more], counted through, with `target` [B, K, m], `target_singles` [B, K, S].

    Row (g, k) belongs to the target's (owners[g], offset + k). `total` [g, k] gets the sum of |difference|^p, `values` its derivatives.
    """
    m, n = target.shape[2], target.shape[2] + target_singles.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):  # infinities end in a sum that is none, which says it
        for row in range(first, last):
            g, k = divmod(row, total.shape[1])
            own, singles = values[g, k, :m], values[g, k, m:n]
            sizes = np.abs(own) if form == "odd" else own
            order, single_order = np.argsort(sizes), np.argsort(singles)
            x, places = full_list(sizes[order], singles[single_order], form)
            y, _ = full_list(target[owners[g], offset + k], target_singles[owners[g], offset + k], form)
            difference = x - y
            cost = np.abs(difference) if p == 1 else np.square(difference)
            total[g, k] = cost.sum(dtype=np.float64)
            slopes = np.sign(difference) if p == 1 else 2 * difference
            singles[single_order] = slopes[places]
            slopes = np.delete(slopes, places)
            if form == "even":
                slopes = slopes[::2] + slopes[1::2]
            elif form == "odd":  # of (v, -v) with respect to |v|, and that with respect to v
                slopes = np.copysign(1, own)[order] * (slopes[m:] - slopes[:m][::-1])
            own[order] = slopes
