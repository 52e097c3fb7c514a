"""Device functions that compare one sorted row with a sorted target, both in half form, without building either full list.

A row of n values is kept as m sorted representatives u_0 <= .. <= u_(m-1) and S single values t_q (0, 1, 2 or 4 of them). The full
sorted list it stands for depends on FORM:

* EVEN (amplitudes): every u_i twice and every t_q once. With c = #{q: t_q < u_i}, the copies of u_i stand at 2i + c and 2i + c + 1, and
  t_q stands behind the smaller t and the 2·#{i: u_i <= t_q} copies.
* ODD (phases; the representatives are sorted magnitudes): u_i and -u_i, and every t_q once. u_i stands at m + i + #{q: t_q < u_i}, -u_i at
  m - 1 - i + #{q: t_q < -u_i}, t_q behind the smaller t and the m + #{u_i <= t_q} - #{u_i < -t_q} pairs.
* PLAIN (no spectrum behind it): every u_i once, S = 0; u_i stands at i.

These positions are a permutation of 0..n-1, ties included. The target's value at a position is found the same way backwards: the
positions b_q of its single values are known, and what is left is a pair. So rank i is compared with the target at i ± 4 at most, and
sum_j |x_(j) - y_(j)|^p comes out exactly, with its derivative for every value.

Arguments that end in `_row` are pointers to the first element of a row, scalar or [rows, 1]; single values are t0..t3, scalar or [rows, 1].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN = tl.constexpr(0)
EVEN = tl.constexpr(1)
ODD = tl.constexpr(2)


@triton.jit
def load_singles(row, S: tl.constexpr):
    """The S single values behind `row`, padded to four with the first (or 0)."""
    if S == 0:
        return 0.0, 0.0, 0.0, 0.0
    else:
        t0 = tl.load(row)
        t1, t2, t3 = t0, t0, t0
        if S > 1:
            t1 = tl.load(row + 1)
        if S > 2:
            t2 = tl.load(row + 2)
            t3 = tl.load(row + 3)
        return t0, t1, t2, t3


@triton.jit
def singles_below(x, t0, t1, t2, t3, S: tl.constexpr):
    """#{q: t_q < x}, int32."""
    c = tl.zeros_like(x).to(tl.int32)
    if S > 0:
        c += (t0 < x).to(tl.int32)
    if S > 1:
        c += (t1 < x).to(tl.int32)
    if S > 2:
        c += (t2 < x).to(tl.int32) + (t3 < x).to(tl.int32)
    return c


@triton.jit
def single(q: tl.constexpr, t0, t1, t2, t3):
    """t_q for a q known when the kernel is compiled."""
    if q < 2:
        return t0 if q == 0 else t1
    else:
        return t2 if q == 2 else t3


@triton.jit
def single_position(q: tl.constexpr, pairs_below, t0, t1, t2, t3, S: tl.constexpr):
    """Position of t_q in the full list, from the number of values of pairs below it; equal single values stand in order of q."""
    t = single(q, t0, t1, t2, t3)
    position = pairs_below
    for r in tl.static_range(S):
        other = single(r, t0, t1, t2, t3)
        if r < q:
            position += (other <= t).to(tl.int32)
        elif r > q:
            position += (other < t).to(tl.int32)
    return position


@triton.jit
def target_at(position, w_row, own_row, place_row, m, mask, FORM: tl.constexpr, S: tl.constexpr):
    """Value of the target's full list at `position`, and whether it belongs to the negative half (always false unless ODD).

    w_row: m sorted representatives; own_row, place_row: S single values and their positions. Never reads outside the row.
    """
    rest = position
    for q in tl.static_range(S):
        rest -= (tl.load(place_row + q) < position).to(tl.int32)
    if FORM == ODD:
        i = rest - m
        negative = i < 0
        i = tl.where(negative, -1 - i, i)
    elif FORM == EVEN:
        i = rest >> 1
        negative = position < 0
    else:
        i = rest
        negative = position < 0
    y = tl.load(w_row + i, mask=mask & (i >= 0) & (i < m), other=0.0)
    if FORM == ODD:
        y = tl.where(negative, -y, y)
    for q in tl.static_range(S):
        here = tl.load(place_row + q) == position
        own = tl.load(own_row + q)
        y = tl.where(here, own, y)
        if FORM == ODD:
            negative = tl.where(here, own < 0.0, negative)
    return y, negative


@triton.jit
def slope(d, POWER: tl.constexpr):
    """Derivative of |d|**POWER, float32: its sign (0 at 0) or 2d."""
    if POWER == 1:
        return (d > 0.0).to(tl.float32) - (d < 0.0).to(tl.float32)
    else:
        return 2.0 * d


@triton.jit
def cost(d, POWER: tl.constexpr):
    if POWER == 1:
        return tl.abs(d)
    else:
        return d * d


@triton.jit
def compare_pairs(
    u, i, t0, t1, t2, t3, w_row, own_row, place_row, m, mask, FORM: tl.constexpr, S: tl.constexpr, POWER: tl.constexpr
):
    """Representatives u at rank i -> their cost and its derivative with respect to u, over both values a representative stands for."""
    if FORM == EVEN:
        p = 2 * i + singles_below(u, t0, t1, t2, t3, S)
        y, _ = target_at(p, w_row, own_row, place_row, m, mask, FORM, S)
        d = u - y
        y, _ = target_at(p + 1, w_row, own_row, place_row, m, mask, FORM, S)
        e = u - y
        return cost(d, POWER) + cost(e, POWER), slope(d, POWER) + slope(e, POWER)
    elif FORM == ODD:
        p = m + i + singles_below(u, t0, t1, t2, t3, S)
        y, _ = target_at(p, w_row, own_row, place_row, m, mask, FORM, S)
        d = u - y
        p = m - 1 - i + singles_below(-u, t0, t1, t2, t3, S)
        y, _ = target_at(p, w_row, own_row, place_row, m, mask, FORM, S)
        e = -u - y
        return cost(d, POWER) + cost(e, POWER), slope(d, POWER) - slope(e, POWER)
    else:
        y, _ = target_at(i, w_row, own_row, place_row, m, mask, FORM, S)
        d = u - y
        return cost(d, POWER), slope(d, POWER)


@triton.jit
def pairs_below_single(at_most, below_minus, m, FORM: tl.constexpr):
    """How many values of pairs stand before t, from #{u_i <= t} and #{u_i < -t}."""
    if FORM == ODD:
        return m + at_most - below_minus
    else:
        return 2 * at_most


@triton.jit
def target_row(row, directions, frames, all_directions, first_direction):
    """Row of the target's [targets, all_directions] for row (sample, direction) of a chunk [samples, directions]."""
    return (row // directions) // frames * all_directions + first_direction + row % directions


def single_places(representatives: Tensor, own: Tensor, form: int) -> Tensor:
    """Positions of the single values in the full lists of a target: int32, of the shape of `own`.

    representatives: [.., m] sorted float32 (magnitudes if `form` is ODD); own: [.., S] sorted float32. Allocates 16 bytes per single value.
    """
    own = own.contiguous()
    at_most = torch.searchsorted(representatives, own, right=True)
    if form == ODD.value:
        below_minus = torch.searchsorted(representatives, -own)
        pairs = representatives.shape[-1] + at_most - below_minus
    else:
        pairs = 2 * at_most
    return (pairs + torch.arange(own.shape[-1], device=own.device)).to(torch.int32)
