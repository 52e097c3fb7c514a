"""Long rows without a sort: counts in bins of a monotone key tell, exactly, the sign of most values; only what they leave open is ordered.

With D(t) = #{x <= t} - #{y <= t} over all n values, x before y where equal, the value of x at rank j lies below that of y at the same rank
exactly where D >= 0 just before it. Count both sides into bins. In a bin that starts at D = B and holds c_x and c_y values, D stays in
[B - c_y, B + c_x]; where that interval does not straddle zero, every sign in the bin is known. The rest, 0.1 to 3 % for two photographs,
is compacted by row and sorted (`merge`); a value's rank is then the number of values in earlier bins plus its rank among what was sorted
of its bin, and it is compared with the target at that rank.

    sum_j |x_(j) - y_(j)| = sum over x of s·x - sum over y of s·y,        s = sign of x_(j) - y_(j) at the rank of each

The y side needs no order either: in a decided bin s is the bin's; in a straddling bin c the y at rank p has s = -1 if p lies before the x
of bin c, +1 if behind, and otherwise its partner is an x of the same bin, which was ordered and contributes the pair. Single values
(the self-conjugate bins) are ranked by counting and contribute pairs too.

Sums are in float64: they cancel to the distance, which may be orders of magnitude smaller. Atomics add integers only, so nothing depends
on their order. Bins of ODD rows are of the magnitude; the two copies u and -u have a sign each, from D on either side.

Traffic, bytes per representative: 4 (count) + 4 + 1 + 1 (signs) + 4 + 4 + 1 (the target's count and signs), and per bin 8 zeroed, 8 read, 1
written; plus one integer atomic on either side. What straddles costs what `merge` costs. Scratch: 16 bytes per representative (words
of what straddles, two buffers), 17 per bin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config as configs
from .count_bins import MINUS, PLUS, STRADDLES, side_sign, singles_before_bin
from .count_straddle import straddle_kernel
from .count_target import count_target_kernel
from .half_list import (
    EVEN,
    ODD,
    load_singles,
    pairs_below_single,
    single,
    single_position,
    target_at,
    target_row,
)
from .launch import architecture, checked_rows, guard, tiles
from .merge import merged_runs, tile_sort_kernel
from .ordering import bin_of, pack, to_key


@triton.jit
def count_kernel(
    v_ptr, scale_ptr, count_ptr, rank_ptr, m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, OF_TARGET: tl.constexpr, LOG_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles): counts [rows, bins] += representatives; rank [rows, 4] += what stands below each single value (S > 0)."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = target_row(row, directions, frames, all_directions, first_direction)
    source = target if OF_TARGET else row
    u = tl.load(v_ptr + source * pitch + o, mask=o < m, other=0.0)
    if FORM == ODD:
        u = tl.abs(u)
    b = bin_of(u, tl.load(scale_ptr + target), FORM == ODD, LOG_BINS)
    tl.atomic_add(count_ptr + (row << LOG_BINS) + b, tl.full((BLOCK,), 1, tl.int32), mask=o < m, sem="relaxed")
    if S > 0:
        # One reduction for all single values: 16 bits each. ODD: [u <= t] - [u < -t], one more so that it is not negative.
        tl.static_assert(BLOCK <= 16384)
        words = tl.zeros((BLOCK,), tl.int64)
        for q in tl.static_range(S):
            t = tl.load(v_ptr + source * pitch + m + q)
            below = (u <= t).to(tl.int64)
            if FORM == ODD:
                below += 1 - (u < -t).to(tl.int64)
            words |= below << (16 * q)
        total = tl.sum(tl.where(o < m, words, 0), 0)
        more = tl.minimum(m - tl.program_id(1) * BLOCK, BLOCK) if FORM == ODD else 0
        for q in tl.static_range(S):
            below = ((total >> (16 * q)) & 0xFFFF).to(tl.int32) - more
            tl.atomic_add(rank_ptr + row * 4 + q, below, sem="relaxed")


@triton.jit
def side_kernel(
    count_ptr, target_count_ptr, scale_ptr, v_ptr, own_ptr, code_ptr, first_ptr, decided_ptr,
    m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): counts of both sides -> code [rows, bins] int8, and for bins that straddle: first [rows, bins], the representatives
    in earlier bins, and decided [rows, bins], how many of those are in bins that do not straddle."""
    row = tl.program_id(0).to(tl.int64)
    target = target_row(row, directions, frames, all_directions, first_direction)
    target_chunk = row // directions // frames * directions + row % directions
    scale = tl.load(scale_ptr + target)
    x0, x1, x2, x3 = load_singles(v_ptr + row * pitch + m, S)
    y0, y1, y2, y3 = load_singles(own_ptr + target * S, S)
    x_below = tl.full((), 0, tl.int32)
    y_below = tl.full((), 0, tl.int32)
    straddling = tl.full((), 0, tl.int32)
    for start in range(0, 1 << LOG_BINS, BLOCK):
        b = start + tl.arange(0, BLOCK)
        o = (row << LOG_BINS) + b
        cx = tl.load(count_ptr + o)
        cy = tl.load(target_count_ptr + (target_chunk << LOG_BINS) + b)
        fx = x_below + tl.cumsum(cx, 0) - cx
        fy = y_below + tl.cumsum(cy, 0) - cy
        sx, in_x = singles_before_bin(b, scale, x0, x1, x2, x3, FORM, S, LOG_BINS, False)
        sy, in_y = singles_before_bin(b, scale, y0, y1, y2, y3, FORM, S, LOG_BINS, False)
        copies = 2 if FORM == EVEN else 1
        d = copies * (fx - fy) + sx - sy
        left = d - copies * cy - in_y >= 0
        right = d + copies * cx + in_x <= 0
        open_ = (left | right) == 0
        code = tl.where(left, 0, PLUS)
        if FORM == ODD:
            sx, in_x = singles_before_bin(b, scale, x0, x1, x2, x3, FORM, S, LOG_BINS, True)
            sy, in_y = singles_before_bin(b, scale, y0, y1, y2, y3, FORM, S, LOG_BINS, True)
            d = (fy + cy) - (fx + cx) + sx - sy
            left = d - cy - in_y >= 0
            right = d + cx + in_x <= 0
            open_ = open_ | ((left | right) == 0)
            code += tl.where(left, 0, MINUS)
        tl.store(code_ptr + o, tl.where(open_, STRADDLES, code).to(tl.int8))
        c = tl.where(open_, cx, 0)
        tl.store(first_ptr + o, fx, mask=open_)
        tl.store(decided_ptr + o, fx - (straddling + tl.cumsum(c, 0) - c), mask=open_)
        x_below += tl.sum(cx, 0)
        y_below += tl.sum(cy, 0)
        straddling += tl.sum(c, 0)


@triton.jit
def count_sign_kernel(
    v_ptr, scale_ptr, code_ptr, rank_ptr, w_ptr, own_ptr, place_ptr, sign_ptr, word_ptr, length_ptr, part_ptr,
    m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, LOG_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles): signs [rows, pitch] of what is decided, its share of the cost [rows, tiles], words of what is not; and the
    single values."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    o = tile * BLOCK + tl.arange(0, BLOCK)
    inside = o < m
    target = target_row(row, directions, frames, all_directions, first_direction)
    v = tl.load(v_ptr + row * pitch + o, mask=inside, other=0.0)
    negative = v < 0.0
    u = v
    if FORM == ODD:
        u = tl.abs(v)
    b = bin_of(u, tl.load(scale_ptr + target), FORM == ODD, LOG_BINS)
    code = tl.load(code_ptr + (row << LOG_BINS) + b, mask=inside, other=0).to(tl.int32)
    if FORM == ODD:
        slope = side_sign(code, PLUS) - side_sign(code, MINUS)
        stored = tl.where(negative, -slope, slope)
    elif FORM == EVEN:
        slope = 2 * side_sign(code, PLUS)
        stored = slope
    else:
        slope = side_sign(code, PLUS)
        stored = slope
    open_ = inside & (code == STRADDLES)
    decided = inside & (code != STRADDLES)
    tl.store(sign_ptr + row * pitch + o, stored.to(tl.int8), mask=decided)
    total = tl.sum(tl.where(decided, slope.to(tl.float64) * u.to(tl.float64), 0.0), 0)
    waiting = open_.to(tl.int32)
    found = tl.sum(waiting, 0)
    if found > 0:
        start = tl.atomic_add(length_ptr + row, found, sem="relaxed")
        at = start + tl.cumsum(waiting, 0) - waiting
        tl.store(word_ptr + row * m + at, pack(to_key(u), 2 * o + negative.to(tl.int32)), mask=open_)
    if tile == 0:
        t0, t1, t2, t3 = load_singles(v_ptr + row * pitch + m, S)
        for q in tl.static_range(S):
            t = single(q, t0, t1, t2, t3)
            p = single_position(q, pairs_below_single(tl.load(rank_ptr + row * 4 + q), 0, m, FORM), t0, t1, t2, t3, S)
            y, _ = target_at(p, w_ptr + target * m, own_ptr + target * S, place_ptr + target * S, m, p >= 0, FORM, S)
            e = t.to(tl.float64) - y.to(tl.float64)
            total += tl.abs(e)
            tl.store(sign_ptr + row * pitch + m + q, ((e > 0.0).to(tl.int32) - (e < 0.0).to(tl.int32)).to(tl.int8))
    tl.store(part_ptr + row * tl.num_programs(1) + tile, total)


def bin_scale(representatives: Tensor, form: int, log_bins: int) -> Tensor:
    """What values are multiplied with before they are binned, from the target's range: float32 [targets, K]. No host sync."""
    targets, every, m = representatives.shape
    if m == 0:
        return torch.ones(targets, every, dtype=torch.float32, device=representatives.device)
    largest = torch.maximum(representatives[..., 0].abs(), representatives[..., -1].abs())
    limit = float(1 << log_bins) if form == ODD.value else 60000.0
    return limit / largest.nan_to_num(1.0).clamp(1e-30, 1e30)


def count_fwd(
    v: Tensor,
    representatives: Tensor,
    own: Tensor,
    place: Tensor,
    form: int,
    power: int = 1,
    first_direction: int = 0,
    config: configs.CountConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Cost and derivatives of projected rows of any length, by counting; p = 1 only.

    Arguments and results are those of `rows.rows_fwd`. Where a value equals its partner the derivative is a subgradient: 0 if the value
    had to be ordered, else the sign of its bin. Scratch as the module's text says. Deterministic.
    """
    m, singles, frames = checked_rows(v, representatives, own, place, first_direction, form, power)
    if power != 1:
        raise ValueError(f"power must be 1 for counting, which knows signs only; got {power}")
    samples, directions, pitch = v.shape
    rows, every = samples * directions, representatives.shape[1]
    sign = torch.empty(v.shape, dtype=torch.int8, device=v.device)
    layout = (directions, frames, every, first_direction)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=v.device)

    def run(c: configs.CountConfig) -> Tensor:
        bins = 1 << c.log_bins
        scale = bin_scale(representatives, form, c.log_bins)
        count, target_count, rank, length = zeros(rows, bins), zeros(rows // frames, bins), zeros(rows, 4), zeros(rows)
        first, decided = (torch.empty(rows, bins, dtype=torch.int32, device=v.device) for _ in range(2))
        code = torch.empty(rows, bins, dtype=torch.int8, device=v.device)
        words = torch.empty(rows, m, dtype=torch.int64, device=v.device)
        visits = tiles(m, c.block)
        part, target_part = torch.empty(2, rows, visits, dtype=torch.float64, device=v.device)
        binned = {"FORM": form, "LOG_BINS": c.log_bins}
        tiled = {**binned, "S": singles, "BLOCK": c.block, "num_warps": c.warps}
        count_kernel[(rows, visits)](v, scale, count, rank, m, pitch, *layout, OF_TARGET=False, **tiled)
        count_kernel[(rows // frames, visits)](
            representatives, scale, target_count, rank, m, m, directions, 1, every, first_direction,
            OF_TARGET=True, **{**tiled, "S": 0},
        )  # fmt: skip
        side_kernel[(rows,)](
            count, target_count, scale, v, own, code, first, decided, m, pitch, *layout,
            **binned, S=singles, BLOCK=min(bins, c.scan_block), num_warps=c.scan_warps,
        )  # fmt: skip
        count_sign_kernel[(rows, visits)](
            v, scale, code, rank, representatives, own, place, sign, words, length, part, m, pitch, *layout, **tiled
        )
        count_target_kernel[(rows, visits)](
            representatives, own, place, v, scale, code, first, count, rank, target_part, m, pitch, *layout, **tiled
        )
        scratch, merge = torch.empty_like(words), c.merge
        tile_sort_kernel[(rows, tiles(m, merge.sort_block))](
            v,
            words,
            scratch,
            length,
            m,
            pitch,
            FORM=form,
            FROM_WORDS=True,
            BLOCK=merge.sort_block,
            num_warps=merge.sort_warps,
        )
        words, last = merged_runs(scratch, words, length, merge)
        visits = tiles(m, merge.merge_block)
        straddle_part = torch.empty(rows, visits, dtype=torch.float64, device=v.device)
        straddle_kernel[(rows, visits)](
            words, length, v, scale, decided, representatives, own, place, sign, straddle_part, m, last, pitch, *layout,
            **binned, S=singles, BLOCK=merge.merge_block, num_warps=merge.merge_warps,
        )  # fmt: skip
        return part.sum(-1) + target_part.sum(-1) + straddle_part.sum(-1)

    with guard(v):
        total = run(config or configs.choose("count", m, architecture(v.device), run))
    return total.view(samples, directions), sign
