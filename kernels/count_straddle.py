"""Counting, what the counts leave open: values of straddling bins, ordered, compared with the target at their rank (see `count`)."""

import triton
import triton.language as tl

from .half_list import EVEN, ODD, load_singles, singles_below, target_at, target_row
from .merge import merge_tile
from .ordering import bin_of, word_low, word_value


@triton.jit
def pair_or_single(x, p, b, negative_x, w_row, own_row, place_row, m, scale, mask, FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr):  # fmt: skip
    """An ordered value x at rank p, in bin b -> its share of the cost (with its partner's if that is in the same bin) and its sign."""
    y, negative_y = target_at(p, w_row, own_row, place_row, m, mask, FORM, S)
    magnitude = y
    if FORM == ODD:
        magnitude = tl.abs(y)
    same = (bin_of(magnitude, scale, FORM == ODD, LOG_BINS) == b) & (negative_x == negative_y)
    s = (x > y).to(tl.int32) - (x < y).to(tl.int32)
    x64 = x.to(tl.float64)
    share = tl.where(same, tl.abs(x64 - y.to(tl.float64)), s.to(tl.float64) * x64)
    return share, s


@triton.jit
def straddle_kernel(
    word_ptr, length_ptr, v_ptr, scale_ptr, decided_ptr, w_ptr, own_ptr, place_ptr, sign_ptr, part_ptr,
    m, run, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles): last merge of the words that straddle -> their signs [rows, pitch] and share of the cost [rows, tiles]."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    n = tl.load(length_ptr + row)
    total = tl.full((), 0.0, tl.float64)
    if start < n:
        target = target_row(row, directions, frames, all_directions, first_direction)
        w_row, own_row, place_row = w_ptr + target * m, own_ptr + target * S, place_ptr + target * S
        scale = tl.load(scale_ptr + target)
        t0, t1, t2, t3 = load_singles(v_ptr + row * pitch + m, S)
        r = start + tl.arange(0, BLOCK)
        inside = r < n
        word = merge_tile(word_ptr + row * m, n, run, start, BLOCK)
        u, low = word_value(word), word_low(word)
        b = bin_of(u, scale, FORM == ODD, LOG_BINS)
        i = r + tl.load(decided_ptr + (row << LOG_BINS) + b, mask=inside, other=0)
        no = r < 0
        if FORM == ODD:
            p = m + i + singles_below(u, t0, t1, t2, t3, S)
            share, slope = pair_or_single(u, p, b, no, w_row, own_row, place_row, m, scale, inside, FORM, S, LOG_BINS)
            p = m - 1 - i + singles_below(-u, t0, t1, t2, t3, S)
            more, s = pair_or_single(-u, p, b, r >= 0, w_row, own_row, place_row, m, scale, inside, FORM, S, LOG_BINS)
            share += more
            slope -= s
            slope = tl.where((low & 1) == 1, -slope, slope)
        elif FORM == EVEN:
            p = 2 * i + singles_below(u, t0, t1, t2, t3, S)
            share, slope = pair_or_single(u, p, b, no, w_row, own_row, place_row, m, scale, inside, FORM, S, LOG_BINS)
            more, s = pair_or_single(u, p + 1, b, no, w_row, own_row, place_row, m, scale, inside, FORM, S, LOG_BINS)
            share += more
            slope += s
        else:
            share, slope = pair_or_single(u, i, b, no, w_row, own_row, place_row, m, scale, inside, FORM, S, LOG_BINS)
        tl.store(sign_ptr + row * pitch + (low >> 1), slope.to(tl.int8), mask=inside)
        total += tl.sum(tl.where(inside, share, 0.0), 0)
    tl.store(part_ptr + row * tl.num_programs(1) + tl.program_id(1), total)
