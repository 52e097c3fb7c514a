"""Rows compared with a sorted target by machine code that numba compiles: what `ranked` does, several times faster.

numba is optional (the extra "cpu") and imported here alone. Functions are compiled when first called, in seconds, and kept on disk: beside
this file or, where that cannot be written, in the user's cache folder (`NUMBA_CACHE_DIR` names another). They let go of the interpreter.
"""

from __future__ import annotations

import numba
import numpy as np

_compiled = numba.njit(nogil=True, cache=True)

WHOLE, EVEN, ODD = 0, 1, 2
"""forms by their number in `ranked.FORMS`"""


@_compiled
def _sort(values, of_magnitudes, words, spare, ordered):
    """Stable radix sort of float32 values [m] or their magnitudes, NaN last.

    `ordered` [m] gets the values; `spare` [m], in its low halves, where each of them comes from. Eleven bits at a time, least first: the
    counts of all three passes stay in the fastest cache.
    """
    bits, found = values.view(np.uint32), ordered.view(np.uint32)
    low, middle, high = np.zeros(2048, np.int32), np.zeros(2048, np.int32), np.zeros(1024, np.int32)
    for i in range(len(bits)):
        b = bits[i]
        size = b & np.uint32(0x7FFFFFFF)
        if size > np.uint32(0x7F800000):
            key = np.uint32(0xFFFFFFFF)
        elif of_magnitudes or b == size:
            key = size | np.uint32(0x80000000)
        else:
            key = ~b
        low[key & np.uint32(2047)] += 1
        middle[(key >> np.uint32(11)) & np.uint32(2047)] += 1
        high[key >> np.uint32(22)] += 1
        words[i] = (np.uint64(key) << np.uint64(32)) | np.uint64(i)
    for counts in (low, middle, high):
        start = np.int32(0)
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
        found[i] = key ^ np.uint32(0x80000000) if key >> np.uint32(31) else ~key


@_compiled
def _merge(values, singles, form, places, full):
    """The full list of ascending representatives [m] and single values [S], which get the positions `places`, behind pairs equal to them."""
    m, done = len(values), 0
    pairs = m if form == WHOLE else 2 * m
    for j in range(len(singles) + 1):
        if j == len(singles):
            end = pairs
        elif form == ODD and singles[j] < 0:
            end = m - np.searchsorted(values, -singles[j])
        else:
            end = np.searchsorted(values, singles[j], side="right")
            end = m + end if form == ODD else 2 * end if form == EVEN else end
        for i in range(done, end):
            if form == WHOLE:
                full[i + j] = values[i]
            elif form == EVEN:
                full[i + j] = values[i >> 1]
            else:
                full[i + j] = values[i - m] if i >= m else -values[m - 1 - i]
        if j < len(singles):
            places[j] = end + j
            full[end + j] = singles[j]
        done = end


@_compiled
def compare(rows, m, target, target_singles, form, p, total, first, last, owners, offset):
    """ """
    count, s = rows.shape[1], rows.shape[2] - m
    n = s + (m if form == WHOLE else 2 * m)
    words, spare, ordered = np.empty(m, np.uint64), np.empty(m, np.uint64), np.empty(m, np.float32)
    single_words, single_spare, singles = np.empty(s, np.uint64), np.empty(s, np.uint64), np.empty(s, np.float32)
    x, y = np.empty(n, np.float32), np.empty(n, np.float32)
    places, target_places = np.empty(s, np.int64), np.empty(s, np.int64)
    for row in range(first, last):
        g, k = row // count, row % count
        values, alone = rows[g, k, :m], rows[g, k, m:]
        _sort(values, form == ODD, words, spare, ordered)
        _sort(alone, False, single_words, single_spare, singles)
        _merge(ordered, singles, form, places, x)
        _merge(target[owners[g], offset + k], target_singles[owners[g], offset + k], form, target_places, y)
        cost = 0.0
        for i in range(n):
            d = x[i] - y[i]
            if p == 1:
                cost += abs(d)
                x[i] = np.float32(d > 0) - np.float32(d < 0)
            else:
                cost += d * d
                x[i] = 2 * d
        total[g, k] = cost
        done = 0
        for j in range(s + 1):
            end = places[j] if j < s else n
            for i in range(done, end):
                x[i - j] = x[i]
            if j < s:
                alone[single_spare[j] & np.uint64(0xFFFFFFFF)] = x[end]
            done = end + 1
        for i in range(m):
            at = spare[i] & np.uint64(0xFFFFFFFF)
            if form == WHOLE:
                values[at] = x[i]
            elif form == EVEN:
                values[at] = x[2 * i] + x[2 * i + 1]
            else:
                slope = x[m + i] - x[m - 1 - i]
                values[at] = -slope if values[at] < 0 else slope
