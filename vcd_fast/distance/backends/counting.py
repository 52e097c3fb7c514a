"""Rows compared with a sorted target on the CPU: by counting where that decides, by sorting where it does not.

The signs of x_(j) - y_(j) are all that the distance and its gradient need (p = 1), and they need no order. Count the
representatives of both sides into bins of a monotone key. In a bin in front of which x is ahead of y by B representatives, and that holds
c_x and c_y of them, x is ahead by B - c_y to B + c_x. Where that interval does not come near zero the bin is *decided*: all of its x lie
below their partners, or all above. What lies in the other bins is sorted, and compared with the target at its rank: the number of values
in earlier bins plus the rank among what was sorted of its own. The sum is

    sum_j |x_(j) - y_(j)| = sum over x of s·x - sum over y of s·y,    s = sign(x_(j) - y_(j)) at the rank of each.

"Near": single values in earlier bins shift the ranks of x and y against each other, which is taken into account; the bins they lie in are
always sorted. The target's counts are fixed (`TargetBins`). For p = 2 the matched values themselves are needed; then, and for short rows,
everything is sorted.

Exact, and the same from run to run. Blocks of rows as in `ranked`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vcd_fast.distance.backends.binning import Workspace
from vcd_fast.distance.backends.ranked import (
    Ordered,
    PerRow,
    RowNumbers,
    Rows,
    Target,
    cost_of,
    float_order,
    from_order,
    pair_slopes,
    rank_of,
    row_keys,
    row_numbers,
    single_places,
    size_of,
    slope_of,
    sort_rows,
    together,
)
from vcd_fast.distance.lists import Form


def compare(rows: Rows, workspace: Workspace) -> np.ndarray:
    """sum_j |x_(j) - y_(j)|^p of every row, float64 [r]; its derivatives replace `rows.values` and `rows.singles`."""
    order = np.argsort(float_order(np.ascontiguousarray(rows.singles)), -1, kind="stable")
    singles = np.take_along_axis(rows.singles, order, -1)
    if rows.values.shape[1] == 0:
        difference = singles - rows.target_singles
        total, single_slopes = cost_of(difference, rows.p).sum(-1, dtype=np.float64), slope_of(difference, rows.p)
    else:
        sizes = rows.values
        if rows.form == "odd":
            sizes = np.abs(sizes, out=workspace.array("sizes", sizes.shape, np.float32))
        elif not sizes.flags.c_contiguous:
            sizes = workspace.array("sizes", sizes.shape, np.float32)
            np.copyto(sizes, rows.values)
        total, slopes, single_slopes = (_sort if rows.key is None else _count)(rows, sizes, singles, workspace)
        if rows.form == "odd":  # d|v| = ±dv: the sign bit of v flips that of the slope
            bits = rows.values.view(np.int32)
            np.bitwise_and(bits, np.int32(-(1 << 31)), out=bits)
            np.bitwise_xor(bits, slopes.view(np.int32), out=bits)
        else:
            rows.values[...] = slopes
    np.put_along_axis(rows.singles, order, single_slopes, -1)
    return total


def _sort(
    rows: Rows, sizes: np.ndarray, singles: np.ndarray, workspace: Workspace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Everything sorted -> sums [r], derivatives [r, m] with respect to `sizes`, and [r, S] to the sorted `singles`."""
    r, m = sizes.shape
    x, row = sort_rows(sizes), row_numbers(singles)
    keys, wanted = x.keys(), row_keys(row, float_order(size_of(singles, rows.form)).ravel())
    at_most, less = (
        (np.searchsorted(keys, wanted, side) - row * m).reshape(singles.shape) for side in ("right", "left")
    )
    places = single_places(singles, m, rows.form, at_most, less)
    first, second, single = Target(rows).differences(x, singles, places)
    cost = cost_of(first, rows.p)
    if second is not None:
        cost += cost_of(second, rows.p)
    slopes = np.empty(r * m, np.float32)
    slopes[x.at] = pair_slopes(rows.form, rows.p, first, second)
    total = cost.reshape(r, m).sum(-1, dtype=np.float64) + cost_of(single, rows.p).sum(-1, dtype=np.float64)
    return total, slopes.reshape(r, m), slope_of(single, rows.p)


@dataclasses.dataclass
class Counted:
    """What is known of x after counting: bins, and the order of what lies in those that are not decided."""

    x: Ordered
    up_to: np.ndarray
    """[r·width] representatives of the row in bins up to j; 0 at the start of a row"""
    start: np.ndarray
    """[r·width] where in `x` bin j begins; anything where it holds nothing"""
    form: Form
    m: int
    singles: np.ndarray
    """[r, S] ascending"""
    places: np.ndarray
    """[r, S] of `singles` in the full lists"""

    def sign_against(self, row: RowNumbers, position: np.ndarray, y: np.ndarray, j: np.ndarray) -> np.ndarray:
        """sign(x - y) for values y of the target at `position` of the full lists, which lie in bins j that are not decided."""
        places = PerRow(self.places)
        if places.count:
            less, single, hit = places.find(row, position)
            position = position - less
        rank, negative = rank_of(position, self.m, self.form)
        before = self.up_to[j - 1]
        here = np.minimum(np.maximum(self.start[j] + rank - before, 0), len(self.x.value) - 1)
        sign = np.sign(self.x.value[here] - size_of(y, self.form)) if len(self.x.value) else np.zeros_like(y)
        sign[rank >= self.up_to[j]] = 1
        sign[rank < before] = -1
        if (
            negative is not None
        ):  # of opposite sides the positive one is larger, of two negative ones that of smaller magnitude
            outward = np.where(negative, np.float32(-1), np.float32(1))
            sign *= outward
            np.copyto(sign, outward, where=negative != np.signbit(y))
        if places.count:
            np.copyto(sign, np.sign(self.singles.ravel()[single] - y), where=hit)
        return sign


def _count(
    rows: Rows, sizes: np.ndarray, singles: np.ndarray, workspace: Workspace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_sort`, sorting only what counting leaves open."""
    r, m = sizes.shape
    key, width = rows.key, rows.key.bins + 1
    bins = key.indices(sizes, rows.scale, workspace, "bins")
    single_bins, target_single_bins = (
        key.indices(size_of(values, rows.form), rows.scale, workspace, name)
        for name, values in (("single bins", singles), ("target single bins", rows.target_singles))
    )
    up_to = key.up_to(bins, workspace, "counts")
    below, above = _turning_points(rows, singles, single_bins, target_single_bins, workspace, up_to.shape)
    slope_of_bin = _slopes_of_bins(rows.form, up_to, rows.up_to, below, above, workspace)
    slope_of_bin[single_bins] = 0
    slope_of_bin[target_single_bins] = 0
    slopes = np.take(slope_of_bin, bins, out=workspace.array("slopes", bins.shape, np.float32), mode="clip")

    x, bin_of = _order(sizes, slopes, bins)
    up_to = up_to.reshape(-1)
    start = workspace.array("start", (r * width,), np.int64)
    begins = np.flatnonzero(bin_of[1:] != bin_of[:-1]) + 1
    start[bin_of[:1]] = 0
    start[bin_of[begins]] = begins
    x.rank = up_to[bin_of - 1] + np.arange(len(bin_of)) - start[bin_of]

    row, keys = row_numbers(singles), x.keys()
    wanted = row_keys(row, float_order(size_of(singles, rows.form)).ravel())
    begins = np.searchsorted(bin_of, single_bins.ravel())
    at_most, less = (
        (up_to[single_bins.ravel() - 1] + np.searchsorted(keys, wanted, side) - begins).reshape(singles.shape)
        for side in ("right", "left")
    )
    places = single_places(singles, m, rows.form, at_most, less)
    first, second, single = Target(rows).differences(x, singles, places)
    slopes.reshape(-1)[x.at] = pair_slopes(rows.form, 1, first, second)
    single_slopes = np.sign(single)

    counted = Counted(x, up_to, start, rows.form, m, singles, places)
    total = _dot(slopes, sizes, workspace) - _target_sums(rows, counted, slope_of_bin, target_single_bins, workspace)
    return total + (single_slopes * singles).sum(-1, dtype=np.float64), slopes, single_slopes


def _turning_points(
    rows: Rows,
    singles: np.ndarray,
    single_bins: np.ndarray,
    target_single_bins: np.ndarray,
    workspace: Workspace,
    shape: tuple[int, int],
) -> tuple[np.ndarray | int, np.ndarray | int]:
    """[r, width] each: x in a bin lies below its partner where x is ahead of y by at least the first, above where by at most the second.

    They would be 0 but for single values. With d more of x's than of y's in earlier bins, an even x, which counts twice, is really ahead by
    2·ahead + d. For odd ones let d⁺ and d⁻ be how many more single values of x than of y are smaller than v and than -v: the copy v is
    ahead by ahead + d⁺, and the copy -v by d⁻ - ahead.
    """
    if rows.form == "whole":
        return 0, 0

    def cumulated(name: str, of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
        """how many more of x's values than of the target's lie in bins up to each"""
        steps = workspace.array(name, shape, np.int32)
        steps.fill(0)
        np.add.at(steps.reshape(-1), of_x, 1)
        np.subtract.at(steps.reshape(-1), of_y, 1)
        return steps.cumsum(-1, dtype=np.int32, out=steps)

    first, second = (workspace.array(name, shape, np.int32) for name in ("below", "above"))
    if rows.form == "even":
        more = cumulated("more", single_bins, target_single_bins)
        np.negative(np.right_shift(more, 1, out=first), out=first)
        np.right_shift(np.negative(more, out=second), 1, out=second)
        return first[:, 1:], second[:, 1:]
    negative, target_negative = np.signbit(singles), np.signbit(rows.target_singles)
    smaller = cumulated("smaller", single_bins[~negative], target_single_bins[~target_negative])
    larger = cumulated("larger", single_bins[negative], target_single_bins[target_negative])
    excess = (negative.sum(-1, keepdims=True) - target_negative.sum(-1, keepdims=True)).astype(np.int32)
    np.negative(np.add(smaller, excess, out=smaller), out=smaller)  # -d⁺
    np.subtract(excess, larger, out=larger)  # d⁻
    return np.maximum(smaller, larger, out=first)[:, 1:], np.minimum(smaller, larger, out=second)[:, 1:]


def _slopes_of_bins(
    form: Form,
    x_up_to: np.ndarray,
    y_up_to: np.ndarray,
    below: np.ndarray | int,
    above: np.ndarray | int,
    workspace: Workspace,
) -> np.ndarray:
    """[r·width] float32: the derivative of a row's sum with respect to a representative in a bin that is decided, else 0."""
    shape = (len(x_up_to), x_up_to.shape[1] - 1)
    ahead, lies_above, lies_below = (
        workspace.array(name, shape, dtype)
        for name, dtype in (("ahead", np.int32), ("lies above", np.bool_), ("lies below", np.bool_))
    )
    np.less_equal(np.subtract(x_up_to[:, 1:], y_up_to[:, :-1], out=ahead), above, out=lies_above)
    np.greater_equal(np.subtract(x_up_to[:, :-1], y_up_to[:, 1:], out=ahead), below, out=lies_below)
    sign = lies_above.view(np.int8)
    np.subtract(sign, lies_below.view(np.int8), out=sign)
    slopes = workspace.array("slope of bin", x_up_to.shape, np.float32)
    np.multiply(sign, np.float32(1 if form == "whole" else 2), out=slopes[:, 1:])
    return slopes.reshape(-1)


def _order(sizes: np.ndarray, slopes: np.ndarray, bins: np.ndarray) -> tuple[Ordered, np.ndarray]:
    """Sort what lies in bins that are not decided -> in order, ranks left out, and the bins."""
    r, m = sizes.shape
    at = np.flatnonzero(slopes == 0)
    order = float_order(sizes.reshape(-1)[at])
    bits = len(at).bit_length()
    words = row_keys(at // m if r > 1 else 0, order)
    words <<= bits
    words |= np.arange(len(at))
    words.sort()
    at = at[words & ((1 << bits) - 1)]
    words >>= bits
    order = words.astype(np.int32)  # the lower half
    return Ordered(at, at // m if r > 1 else 0, from_order(order), order, at), bins.reshape(-1)[at]


def _target_sums(
    rows: Rows, counted: Counted, slope_of_bin: np.ndarray, single_bins: np.ndarray, workspace: Workspace
) -> np.ndarray:
    """sum over y of s·y, float64 [r]: by bins where they are decided, else value by value."""
    r, m = rows.target.shape
    slopes = slope_of_bin.reshape(r, -1)[:, 1:]
    total = np.multiply(slopes, rows.sums, out=workspace.array("sums", rows.sums.shape, np.float64)).sum(-1)
    filled = np.flatnonzero((slopes == 0) & (rows.up_to[:, 1:] > rows.up_to[:, :-1]))
    row = filled // slopes.shape[1]
    j = filled + row + 1
    first = rows.up_to.reshape(-1)[j - 1].astype(np.int64)
    count = rows.up_to.reshape(-1)[j] - first
    ends = count.cumsum()
    if not len(ends):
        ends = np.zeros(1, np.int64)
    rank = np.arange(ends[-1]) + np.repeat(first - (ends - count if len(count) else 0), count)
    j, row = np.repeat(j, count), np.repeat(row, count) if r > 1 else 0
    value = rows.target.reshape(-1)[rank + row * m]

    pairs_before = PerRow(rows.target_places - np.arange(rows.singles.shape[1]))

    def place(position: np.ndarray) -> np.ndarray:
        """position among the values of pairs -> position in the full list"""
        return position + pairs_before.less(row, position + 1)

    if rows.form == "whole":
        copies = [(rank, value)]
    elif rows.form == "even":
        position = place(2 * rank)  # no single value stands between the two copies
        copies = [(position, value), (position + 1, value)]
    else:
        copies = [(place(m + rank), value), (place(m - 1 - rank), -value)]
    position = np.concatenate([*(copy[0] for copy in copies), rows.target_places.reshape(-1)])
    y = np.concatenate([*(copy[1] for copy in copies), rows.target_singles.reshape(-1)])
    row = together([*[row] * len(copies), row_numbers(rows.singles)])
    sign = counted.sign_against(row, position, y, np.concatenate([*[j] * len(copies), single_bins.reshape(-1)]))
    weighted = sign.astype(np.float64) * y
    if r == 1:
        return total + weighted.sum()
    return total + np.bincount(row, weights=weighted, minlength=r)


def _dot(slopes: np.ndarray, values: np.ndarray, workspace: Workspace) -> np.ndarray:
    """Row sums of products, in float64: they cancel to the distance, which may be orders of magnitude smaller."""
    products = np.multiply(slopes, values, out=workspace.array("products", values.shape, np.float32))
    return products.sum(-1, dtype=np.float64)
