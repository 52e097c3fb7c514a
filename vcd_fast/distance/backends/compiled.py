"""Rows compared with a sorted target by machine code that numba compiles: what `ranked` does, several times faster.

numba is optional (the extra "cpu") and imported here alone. Functions are compiled when first called, in seconds, and kept on disk: beside
this file or, where that cannot be written, in the user's cache folder (`NUMBA_CACHE_DIR` names another). They let go of the interpreter,
so that threads really run side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from vcd_fast.distance.lists import Form

WHOLE, EVEN, ODD = range(3)
FORMS: dict[Form, int] = {"whole": WHOLE, "even": EVEN, "odd": ODD}


def _compiled(function: Callable) -> Callable:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep it in: every process compiles anew
        return numba.njit(nogil=True)(function)


@_compiled
def _sort(values, of_magnitudes, words, spare, ordered):
    """Stable radix sort of float32 values [m] or their magnitudes, NaN last.

    `ordered` [m] gets the values; `spare` [m], in its low halves, where each of them comes from. Eleven bits at a time, least first: the
    counts of all three passes stay in the fastest cache.
    """
    bits, found, top = values.view(np.uint32), ordered.view(np.uint32), np.uint32(0x80000000)
    low, middle, high = np.zeros(2048, np.uint32), np.zeros(2048, np.uint32), np.zeros(1024, np.uint32)
    for i in range(len(bits)):
        b = bits[i]
        size = b & np.uint32(0x7FFFFFFF)
        # no branch on the sign: it is as good as random
        key = size | top if of_magnitudes else b ^ (np.uint32(-np.int64(b >> np.uint32(31))) | top)
        if size > np.uint32(0x7F800000):
            key = np.uint32(0xFFFFFFFF)
        low[key & np.uint32(2047)] += 1
        middle[(key >> np.uint32(11)) & np.uint32(2047)] += 1
        high[key >> np.uint32(22)] += 1
        words[i] = (np.uint64(key) << np.uint64(32)) | np.uint64(i)
    for counts in (low, middle, high):
        start = np.uint32(0)
        for j in range(len(counts)):
            count = counts[j]
            counts[j] = start
            start += count
    for i in range(len(bits)):
        word = words[i]
        digit = (word >> np.uint64(32)) & np.uint64(2047)
        spare[low[digit]] = word
        low[digit] += 1
    for i in range(len(bits)):
        word = spare[i]
        digit = (word >> np.uint64(43)) & np.uint64(2047)
        words[middle[digit]] = word
        middle[digit] += 1
    for i in range(len(bits)):
        word = words[i]
        digit = word >> np.uint64(54)
        spare[high[digit]] = word
        high[digit] += 1
    for i in range(len(bits)):
        key = np.uint32(spare[i] >> np.uint64(32))
        found[i] = key ^ top if key >= top else ~key


@_compiled
def _pairs_up_to(single, values, form):
    """How many values of the pairs of ascending representatives are <= single."""
    mirrored = form == ODD and single < 0  # -v <= single where v >= -single
    first, last = 0, len(values)
    while first < last:
        middle = (first + last) // 2
        if values[middle] < -single if mirrored else values[middle] <= single:
            first = middle + 1
        else:
            last = middle
    if form == ODD:
        return len(values) - first if mirrored else len(values) + first
    return first if form == WHOLE else 2 * first


@_compiled
def _merge(values, singles, form, full):
    """The full ascending list of representatives and single values, both ascending; the latter stand behind pairs equal to them."""
    m, done = len(values), 0
    for j in range(len(singles) + 1):
        end = _pairs_up_to(singles[j], values, form) if j < len(singles) else len(full) - j
        piece = full[done + j : end + j]
        if form == ODD:
            for i in range(done, min(end, m)):
                piece[i - done] = -values[m - 1 - i]
            for i in range(max(done, m), end):
                piece[i - done] = values[i - m]
        else:
            shift = np.uint64(form == EVEN)
            for i in range(len(piece)):
                piece[i] = values[np.uint64(done + i) >> shift]
        if j < len(singles):
            full[end + j] = singles[j]
        done = end


@_compiled
def _cost(difference, p):
    return abs(difference) if p == 1 else difference * difference


@_compiled
def _slope(difference, p):
    return np.float32(difference > 0) - np.float32(difference < 0) if p == 1 else 2 * difference


@_compiled
def _compare(rows, target, target_singles, owners, offset, form, p, total, first, last):
    m, s = target.shape[2], target_singles.shape[2]
    words, spare, ordered = np.empty(m, np.uint64), np.empty(m, np.uint64), np.empty(m, np.float32)
    single_words, single_spare, singles = np.empty(s, np.uint64), np.empty(s, np.uint64), np.empty(s, np.float32)
    y = np.empty(s + (m if form == WHOLE else 2 * m), np.float32)
    low_half, top = np.uint64(0xFFFFFFFF), np.uint32(0x80000000)
    for row in range(first, last):
        g, k = divmod(row, rows.shape[1])
        values, alone = rows[g, k, :m], rows[g, k, m : m + s]
        signs = values.view(np.uint32)
        _sort(values, form == ODD, words, spare, ordered)
        _sort(alone, False, single_words, single_spare, singles)
        _merge(target[owners[g], offset + k], target_singles[owners[g], offset + k], form, y)
        cost, smaller, smaller_than_mirrored = 0.0, 0, s
        for i in range(m):
            at, v = spare[i] & low_half, ordered[i]
            while smaller < s and singles[smaller] < v:
                smaller += 1
            if form == WHOLE:
                d = v - y[np.uint64(smaller + i)]
                cost += _cost(d, p)
                values[at] = _slope(d, p)
            elif form == EVEN:
                d, e = v - y[np.uint64(2 * i + smaller)], v - y[np.uint64(2 * i + smaller + 1)]
                cost += _cost(d, p) + _cost(e, p)
                values[at] = _slope(d, p) + _slope(e, p)
            else:
                while smaller_than_mirrored > 0 and not singles[smaller_than_mirrored - 1] < -v:
                    smaller_than_mirrored -= 1
                d, e = v - y[np.uint64(m + i + smaller)], -v - y[np.uint64(m - 1 - i + smaller_than_mirrored)]
                cost += _cost(d, p) + _cost(e, p)
                sign = signs[at] & top
                values[at] = _slope(d, p) - _slope(e, p)
                signs[at] ^= sign
        for j in range(s):
            d = singles[j] - y[_pairs_up_to(singles[j], ordered, form) + j]
            cost += _cost(d, p)
            alone[single_spare[j] & low_half] = _slope(d, p)
        total[g, k] = cost


@_compiled
def _sort_rows(source, ordered, first, last):
    words, spare = np.empty(source.shape[1], np.uint64), np.empty(source.shape[1], np.uint64)
    for row in range(first, last):
        _sort(source[row], False, words, spare, ordered[row])


def sort(source: np.ndarray, ordered: np.ndarray, first: int, last: int) -> None:
    """`ranked.sort`, of contiguous float32 arrays."""
    _sort_rows(source, ordered, first, last)


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
    """`ranked.compare`, of contiguous arrays."""
    _compare(values, target, target_singles, owners, offset, FORMS[form], p, total, first, last)
