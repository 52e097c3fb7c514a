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
FEW_SINGLES = 8
"""up to which counting what is below each of them takes less time than a pass over the sorted list"""


def _compiled(function: Callable) -> Callable:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep it in: every process compiles anew
        return numba.njit(nogil=True)(function)


@_compiled
def _key(bits, of_magnitudes):
    """Bits of a float32 value, or of its magnitude -> a number ordered as they are, NaN last."""
    size, top = bits & np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
    # no branch on the sign: it is as good as random
    key = size | top if of_magnitudes else bits ^ (np.uint32(-np.int64(bits >> np.uint32(31))) | top)
    return np.uint32(0xFFFFFFFF) if size > np.uint32(0x7F800000) else key


@_compiled
def _almost_sorted(values, of_magnitudes, words, spare):
    """Two of the three passes of a stable radix sort of float32 values [m] or their magnitudes, NaN last.

    Eleven bits at a time, least first: the counts of all passes stay in the fastest cache. `spare` [m] gets words, key above index, in the
    order of their lower 22 bits. Returns, for every value of the upper ten, the rank of the first word that has it.
    """
    bits = values.view(np.uint32)
    low, middle, high = np.zeros(2048, np.uint32), np.zeros(2048, np.uint32), np.zeros(1024, np.uint32)
    for i in range(len(bits)):
        key = _key(bits[i], of_magnitudes)
        low[key & np.uint32(2047)] += 1
        middle[(key >> np.uint32(11)) & np.uint32(2047)] += 1
        high[key >> np.uint32(22)] += 1
    for counts in (low, middle, high):
        start = np.uint32(0)
        for j in range(len(counts)):
            count = counts[j]
            counts[j] = start
            start += count
    for i in range(len(bits)):
        key = _key(bits[i], of_magnitudes)
        digit = key & np.uint32(2047)
        words[low[digit]] = (np.uint64(key) << np.uint64(32)) | np.uint64(i)
        low[digit] += 1
    for i in range(len(bits)):
        word = words[i]
        digit = (word >> np.uint64(43)) & np.uint64(2047)
        spare[middle[digit]] = word
        middle[digit] += 1
    return high


@_compiled
def _last_pass(spare, high, words):
    for i in range(len(spare)):
        word = spare[i]
        digit = word >> np.uint64(54)
        words[high[digit]] = word
        high[digit] += 1


@_compiled
def _words_up_to(key, words, or_equal):
    """How many of the sorted words have keys < or <= key."""
    first, last = 0, len(words)
    while first < last:
        middle = (first + last) // 2
        other = np.uint32(words[middle] >> np.uint64(32))
        if other < key or (or_equal and other == key):
            first = middle + 1
        else:
            last = middle
    return first


@_compiled
def _positions(values, words, ordered, singles, form, positions):
    """Positions in the full list of its ascending single values, which stand behind pairs equal to them; strictly ascending.

    Counted among `values`, or found in `words` if those are `ordered`.
    """
    m = len(values)
    bits = singles.view(np.uint32)
    for j in range(len(singles)):
        x = singles[j]
        mirrored = form == ODD and x < 0  # -v <= x where v >= -x
        count = 0
        if ordered:
            count = _words_up_to(_key(bits[j], form == ODD), words, not mirrored)
            count = m - count if mirrored else count
        elif mirrored:
            for i in range(m):
                count += abs(values[i]) >= -x
        elif form == ODD:
            for i in range(m):
                count += not abs(values[i]) > x
        else:
            for i in range(m):
                count += not values[i] > x
        if form == EVEN:
            count *= 2
        elif form == ODD and not mirrored:
            count += m
        positions[j] = count + j


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
def _copy_pairs(values, start, form, piece):
    """Values number `start` and on of the pairs of ascending representatives, in ascending order, into `piece`."""
    m = len(values)
    if form != ODD:
        shift = np.uint64(form == EVEN)
        for i in range(len(piece)):
            piece[i] = values[np.uint64(start + i) >> shift]
        return
    below = min(max(m - start, 0), len(piece))
    for i in range(below):
        piece[i] = -values[np.uint64(m - 1 - start - i)]
    above, source = piece[below:], values[max(start - m, 0) :]
    for i in range(len(above)):
        above[i] = source[np.uint64(i)]


@_compiled
def _opposite(values, singles, form, positions, pairs, alone):
    """What the other list's pairs and single values are compared with, if its single values stand at `positions`.

    `pairs` and `alone` get the full list of ascending representatives `values` and ascending `singles`, in ascending order, shared out.
    """
    s, length = len(singles), len(pairs) + len(singles)
    mine, theirs, at = 0, 0, 0
    while at < length:
        my_next = _pairs_up_to(singles[mine], values, form) + mine if mine < s else length
        their_next = positions[theirs] if theirs < s else length
        end = max(at, min(my_next, their_next))
        _copy_pairs(values, at - mine, form, pairs[at - theirs : end - theirs])
        at = end
        if at == length:
            return
        piece = alone[theirs : theirs + 1] if at == their_next else pairs[at - theirs : at - theirs + 1]
        if at >= my_next:
            piece[0] = singles[mine]
            mine += 1
        else:
            _copy_pairs(values, at - mine, form, piece)
        theirs += at == their_next
        at += 1


@_compiled
def _cost(difference, p):
    return abs(difference) if p == 1 else difference * difference


@_compiled
def _slope(difference, p):
    if p == 1:
        return np.float32(np.int32(difference > 0) - np.int32(difference < 0))
    return 2 * difference


@_compiled
def _compare(rows, target, target_singles, owners, offset, form, p, total, first, last):
    m, s = target.shape[2], target_singles.shape[2]
    words, spare = np.empty(m, np.uint64), np.empty(m, np.uint64)
    singles, positions, alone = np.empty(s, np.float32), np.empty(s, np.int64), np.empty(s, np.float32)
    y = np.empty(m if form == WHOLE else 2 * m, np.float32)
    low_half, top, one = np.uint64(0xFFFFFFFF), np.uint32(0x80000000), np.uint64(1)
    ordered = s > FEW_SINGLES
    for row in range(first, last):
        g, k = divmod(row, rows.shape[1])
        values, lone = rows[g, k, :m], rows[g, k, m : m + s]
        signs = values.view(np.uint32)
        order = np.argsort(lone)
        for j in range(s):
            singles[j] = lone[order[j]] + np.float32(0)  # without -0, whose key is another
        high = _almost_sorted(values, form == ODD, words, spare)
        if ordered:
            _last_pass(spare, high, words)
        source = words if ordered else spare
        _positions(values, words, ordered, singles, form, positions)
        _opposite(target[owners[g], offset + k], target_singles[owners[g], offset + k], form, positions, y, alone)
        cost = 0.0
        # the last pass of the sort, but where a word would go, what it stands for is compared
        for n in range(m):
            word = source[n]
            i = np.uint64(n)
            if not ordered:
                digit = word >> np.uint64(54)
                i = np.uint64(high[digit])
                high[digit] += 1
            at = word & low_half
            if form == WHOLE:
                d = values[at] - y[i]
                cost += _cost(d, p)
                values[at] = _slope(d, p)
            elif form == EVEN:
                d, e = values[at] - y[i + i], values[at] - y[i + i + one]
                cost += _cost(d, p) + _cost(e, p)
                values[at] = _slope(d, p) + _slope(e, p)
            else:
                v, sign = abs(values[at]), signs[at] & top
                d, e = v - y[np.uint64(m) + i], -v - y[np.uint64(m) - one - i]
                cost += _cost(d, p) + _cost(e, p)
                values[at] = _slope(d, p) - _slope(e, p)
                signs[at] ^= sign
        for j in range(s):
            d = singles[j] - alone[j]
            cost += _cost(d, p)
            lone[order[j]] = _slope(d, p)
        total[g, k] = cost


@_compiled
def _sort_rows(source, ordered, first, last):
    words, spare = np.empty(source.shape[1], np.uint64), np.empty(source.shape[1], np.uint64)
    bits, top = ordered.view(np.uint32), np.uint32(0x80000000)
    for row in range(first, last):
        high = _almost_sorted(source[row], False, words, spare)
        for i in range(len(spare)):
            word = spare[i]
            digit = word >> np.uint64(54)
            key = np.uint32(word >> np.uint64(32))
            bits[row, high[digit]] = key ^ top if key >= top else ~key
            high[digit] += 1


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
