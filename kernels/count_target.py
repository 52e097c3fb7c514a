"""Counting, the target's side: the sign at the rank of every target value, from counts alone (see `count`)."""

import triton
import triton.language as tl

from .count_bins import MINUS, PLUS, STRADDLES, side_sign, singles_before_bin
from .half_list import EVEN, ODD, load_singles, pairs_below_single, single, single_position, singles_below, target_row
from .ordering import bin_of


@triton.jit
def target_sign(
    p, b, code, first, count, scale, x0, x1, x2, x3, p0, p1, p2, p3, m,
    FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Sign s at rank p of a target value in bin b, or 0 where its partner accounts for the pair (see the module's text)."""
    before, inside = singles_before_bin(b, scale, x0, x1, x2, x3, FORM, S, LOG_BINS, NEGATIVE)
    if NEGATIVE:
        start = m - first - count + before
        s = side_sign(code, MINUS)
    else:
        s = side_sign(code, PLUS)
        if FORM == ODD:
            start = m + first + before
        elif FORM == EVEN:
            start = 2 * first + before
        else:
            start = first
    end = start + (2 if FORM == EVEN else 1) * count + inside
    s = tl.where(code == STRADDLES, tl.where(p < start, -1, tl.where(p >= end, 1, 0)), s)
    for q in tl.static_range(S):
        s = tl.where(p == single(q, p0, p1, p2, p3), 0, s)
    return s


@triton.jit
def count_target_kernel(
    w_ptr, own_ptr, place_ptr, v_ptr, scale_ptr, code_ptr, first_ptr, count_ptr, rank_ptr, part_ptr,
    m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles): the target's share of the cost [rows, tiles], -sum of s·y."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    inside = i < m
    target = target_row(row, directions, frames, all_directions, first_direction)
    scale = tl.load(scale_ptr + target)
    x0, x1, x2, x3 = load_singles(v_ptr + row * pitch + m, S)
    y0, y1, y2, y3 = load_singles(own_ptr + target * S, S)
    p0, p1, p2, p3 = 0, 0, 0, 0
    if S > 0:
        p0 = single_position(0, pairs_below_single(tl.load(rank_ptr + row * 4), 0, m, FORM), x0, x1, x2, x3, S)
    if S > 1:
        p1 = single_position(1, pairs_below_single(tl.load(rank_ptr + row * 4 + 1), 0, m, FORM), x0, x1, x2, x3, S)
    if S > 2:
        p2 = single_position(2, pairs_below_single(tl.load(rank_ptr + row * 4 + 2), 0, m, FORM), x0, x1, x2, x3, S)
        p3 = single_position(3, pairs_below_single(tl.load(rank_ptr + row * 4 + 3), 0, m, FORM), x0, x1, x2, x3, S)
    w = tl.load(w_ptr + target * m + i, mask=inside, other=0.0)
    b = bin_of(w, scale, FORM == ODD, LOG_BINS)
    at = (row << LOG_BINS) + b
    code = tl.load(code_ptr + at, mask=inside, other=0).to(tl.int32)
    open_ = inside & (code == STRADDLES)
    first = tl.load(first_ptr + at, mask=open_, other=0)
    count = tl.load(count_ptr + at, mask=open_, other=0)
    if FORM == ODD:
        p = m + i + singles_below(w, y0, y1, y2, y3, S)
        s = target_sign(p, b, code, first, count, scale, x0, x1, x2, x3, p0, p1, p2, p3, m, FORM, S, LOG_BINS, False)
        p = m - 1 - i + singles_below(-w, y0, y1, y2, y3, S)
        s -= target_sign(p, b, code, first, count, scale, x0, x1, x2, x3, p0, p1, p2, p3, m, FORM, S, LOG_BINS, True)
    elif FORM == EVEN:
        p = 2 * i + singles_below(w, y0, y1, y2, y3, S)
        s = target_sign(p, b, code, first, count, scale, x0, x1, x2, x3, p0, p1, p2, p3, m, FORM, S, LOG_BINS, False)
        p += 1
        s += target_sign(p, b, code, first, count, scale, x0, x1, x2, x3, p0, p1, p2, p3, m, FORM, S, LOG_BINS, False)
    else:
        s = target_sign(i, b, code, first, count, scale, x0, x1, x2, x3, p0, p1, p2, p3, m, FORM, S, LOG_BINS, False)
    # a target value with s = 0 must not count even if it is infinite; a NaN must
    use = inside & ((s != 0) | (w != w))
    total = -tl.sum(tl.where(use, s.to(tl.float64) * w.to(tl.float64), 0.0), 0)
    if tile == 0:
        for q in tl.static_range(S):
            t = single(q, y0, y1, y2, y3)
            here = tl.load(place_ptr + target * S + q)
            if FORM == ODD:
                bin_t = bin_of(tl.abs(t), scale, True, LOG_BINS)
            else:
                bin_t = bin_of(t, scale, False, LOG_BINS)
            at_t = (row << LOG_BINS) + bin_t
            code_t = tl.load(code_ptr + at_t).to(tl.int32)
            first_t = tl.load(first_ptr + at_t, mask=code_t == STRADDLES, other=0)
            count_t = tl.load(count_ptr + at_t)
            s_t = target_sign(
                here,
                bin_t,
                code_t,
                first_t,
                count_t,
                scale,
                x0,
                x1,
                x2,
                x3,
                p0,
                p1,
                p2,
                p3,
                m,
                FORM,
                S,
                LOG_BINS,
                False,
            )
            if FORM == ODD:
                minus = target_sign(
                    here,
                    bin_t,
                    code_t,
                    first_t,
                    count_t,
                    scale,
                    x0,
                    x1,
                    x2,
                    x3,
                    p0,
                    p1,
                    p2,
                    p3,
                    m,
                    FORM,
                    S,
                    LOG_BINS,
                    True,
                )
                s_t = tl.where(t < 0.0, minus, s_t)
            total -= tl.where((s_t != 0) | (t != t), s_t.to(tl.float64) * t.to(tl.float64), 0.0)
    tl.store(part_ptr + row * tl.num_programs(1) + tile, total)
