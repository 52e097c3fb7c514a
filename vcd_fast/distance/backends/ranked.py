"""Blocks of rows in half form, in NumPy: what stands at which rank of a full list, and what that costs.

A row holds m representatives and S single values (self-conjugate bins) in the form of `lists.Lists`; its full list has n values. Full
lists are never built, positions in them are computed. Rows of a block are arrays [r, m] and [r, S], float32; a flat index is row·m + j.

Positions are a permutation of 0..n-1, ties included: equal values stand pairs first, then single values in their order. Values are
ordered by their bits (-0 before 0, NaN beyond the infinities), so that nothing is lost whatever they are.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from vcd_fast.distance.backends.binning import Key
from vcd_fast.distance.lists import Form

LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)
"""halves of an int64 seen as two int32"""
FEW = 4
"""single values per row that are looked through one by one"""

RowNumbers = np.ndarray | int
"""the row of each of some values; 0 for all of them in a block of one row"""


@dataclasses.dataclass
class Rows:
    """A block of rows of one part, and what they are compared with."""

    values: np.ndarray
    """[r, m] representatives as projected: signed also where the form is odd"""
    singles: np.ndarray
    """[r, S]"""
    target: np.ndarray
    """[r, m] ascending; magnitudes where the form is odd"""
    target_singles: np.ndarray
    """[r, S] ascending"""
    target_places: np.ndarray
    """[r, S] int64, positions of `target_singles` in the target's full lists"""
    form: Form
    p: int
    key: Key | None
    """of the bins that the target was counted in, and its `TargetBins` by row; None: it was not"""
    scale: np.ndarray | None = None
    up_to: np.ndarray | None = None
    sums: np.ndarray | None = None


@dataclasses.dataclass
class Ordered:
    """Representatives in order: by row, then by value. Either all of the block's, or those of some ranks."""

    at: np.ndarray
    """flat indices of where they come from"""
    row: RowNumbers
    value: np.ndarray
    """magnitudes where the form is odd"""
    order: np.ndarray
    """`float_order(value)`"""
    rank: np.ndarray
    """among all representatives of the row"""

    def keys(self) -> np.ndarray:
        return row_keys(self.row, self.order)


class PerRow:
    """A few ascending integers per row [r, S], to look others up in."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.int64)
        self.flat = self.values.ravel()
        self.count = values.shape[1]

    def less(self, row: RowNumbers, wanted: np.ndarray) -> np.ndarray | int:
        """How many of its row are smaller than each of `wanted`."""
        if self.count == 0:
            return 0
        if self.count <= FEW and isinstance(row, int):
            return sum(self.values[0, q] < wanted for q in range(1, self.count)) + (self.values[0, 0] < wanted)
        offset = np.int64(1) << 40
        keys = (self.values + np.arange(len(self.values))[:, None] * offset).ravel()
        return np.searchsorted(keys, wanted + row * offset) - row * self.count

    def find(self, row: RowNumbers, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> how many are smaller, the flat index of the next, and whether that is the one wanted."""
        less = self.less(row, wanted)
        at = np.minimum(less, self.count - 1) + row * self.count
        return less, at, self.flat[at] == wanted


def float_order(values: np.ndarray) -> np.ndarray:
    """float32 -> int32 in the same order."""
    bits = values.view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_order(order: np.ndarray) -> np.ndarray:
    """The inverse of `float_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)


def row_keys(row: RowNumbers, order: np.ndarray) -> np.ndarray:
    """int64 that sort by row, then by value."""
    return order.astype(np.int64) + (np.asarray(row, np.int64) << 32)


def row_numbers(values: np.ndarray) -> RowNumbers:
    """[r, k] -> the row of each value, [r·k]."""
    return np.repeat(np.arange(len(values)), values.shape[1]) if len(values) > 1 else 0


def together(rows: list[RowNumbers]) -> RowNumbers:
    """Row numbers one after the other."""
    return 0 if isinstance(rows[0], int) else np.concatenate(rows)


def size_of(values: np.ndarray, form: str) -> np.ndarray:
    """What a value is ranked by: its magnitude where the form is odd."""
    return np.abs(values) if form == "odd" else values


def sort_rows(values: np.ndarray) -> Ordered:
    """All of [r, m], sorted row by row with one SIMD sort of (value, index) words."""
    r, m = values.shape
    words = np.empty((r, m), np.int64)
    halves = words.view(np.int32).reshape(r, m, 2)
    halves[..., HIGH] = float_order(values)
    halves[..., LOW] = np.arange(m, dtype=np.int32)
    words.sort(-1)
    order = halves[..., HIGH].ravel()
    row = row_numbers(values)
    return Ordered((words & 0xFFFFFFFF).ravel() + row * m, row, from_order(order), order, np.tile(np.arange(m), r))


def cost_of(difference: np.ndarray, p: int) -> np.ndarray:
    """|d|^p"""
    return np.abs(difference) if p == 1 else np.square(difference)


def slope_of(difference: np.ndarray, p: int) -> np.ndarray:
    """Its derivative, 0 at 0."""
    return np.sign(difference) if p == 1 else 2 * difference


def rank_of(position: np.ndarray, m: int, form: Form) -> tuple[np.ndarray, np.ndarray | None]:
    """Position among the values of pairs alone -> rank of the representative, and whether it is the negative copy (odd form)."""
    if form == "whole":
        return position, None
    if form == "even":
        return position >> 1, None
    rank = position - m
    sign = rank >> 63
    return rank ^ sign, sign.view(np.bool_)[:: rank.itemsize]


def single_places(singles: np.ndarray, m: int, form: Form, at_most: np.ndarray, less: np.ndarray) -> np.ndarray:
    """Positions of ascending single values [r, S] in the full lists of their rows, even or odd -> [r, S].

    Args:
        at_most: how many representatives of the row are ≤ the value (its magnitude if the form is odd). less: <.
    """
    pairs = np.where(np.signbit(singles), m - less, m + at_most) if form == "odd" else 2 * at_most
    return pairs + np.arange(singles.shape[1])


class Target:
    """The target's side of a block: values by position."""

    def __init__(self, rows: Rows) -> None:
        self.form, self.m = rows.form, rows.target.shape[1]
        self.values, self.singles = rows.target.ravel(), rows.target_singles.ravel()
        self.places = PerRow(rows.target_places)

    def at(self, row: RowNumbers, position: np.ndarray) -> np.ndarray:
        """Values at `position` of the full lists of `row`."""
        if self.places.count:
            less, single, hit = self.places.find(row, position)
            position = position - less
        rank, negative = rank_of(position, self.m, self.form)
        value = self.values[np.minimum(rank, self.m - 1) + row * self.m]
        if negative is not None:
            np.negative(value, out=value, where=negative)
        if self.places.count:
            np.copyto(value, self.singles[single], where=hit)
        return value

    def differences(
        self, x: Ordered, singles: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """x minus the target at equal ranks, for ordered representatives and for x's single values [r, S] at `places`.

        Returns:
            [e] for the copy v; [e] for the other copy, v again (even) or -v (odd), None if there is none (whole); [r, S].
        """
        own = PerRow(float_order(singles))
        if self.form == "whole":
            return x.value - self.at(x.row, x.rank), None, singles
        if self.form == "even":
            first = 2 * x.rank + own.less(x.row, x.order)
            other, second = x.value, first + 1
        else:
            other = -x.value
            first = x.rank + own.less(x.row, x.order) + self.m
            second = own.less(x.row, float_order(other)) + (self.m - 1) - x.rank
        y = self.at(together([x.row, x.row, row_numbers(singles)]), np.concatenate([first, second, places.ravel()]))
        e = len(first)
        return x.value - y[:e], other - y[e : 2 * e], singles - y[2 * e :].reshape(singles.shape)


def pair_slopes(form: Form, p: int, first: np.ndarray, second: np.ndarray | None) -> np.ndarray:
    """Derivative of the cost of a representative's copies with respect to it, from `Target.differences`."""
    slope = slope_of(first, p)
    if second is None:
        return slope
    return slope - slope_of(second, p) if form == "odd" else slope + slope_of(second, p)
