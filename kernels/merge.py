"""Long rows by tile sort and merge path; the last merge compares with the sorted target and writes signs instead of the sorted row.

Words of 64 bits (order-preserving key above, index below) are sorted inside tiles in registers and then merged run by run. Each program of
a merge finds where its window starts in both runs by a binary search on the merge path's diagonal, loads one window of each, keeps the
smaller half (min(a, reversed b) is bitonic) and finishes with log2(BLOCK) compare-exchanges. No scatter of keys, no atomics, no waiting
of one program for another; ragged rows by masks. The target is sorted already, so the last merge looks it up by rank (`half_list`).

Traffic, bytes per representative: 4 + 8 for the tile sort, 24 a pass (16, and 8 from L2 because windows overlap), 21 for the last one.
Scratch: 16 bytes per representative (two buffers of words), freed on return.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config as configs
from .half_list import (
    ODD,
    compare_pairs,
    cost,
    load_singles,
    pairs_below_single,
    single,
    single_position,
    slope,
    target_at,
    target_row,
)
from .launch import architecture, checked_rows, guard, sign_dtype, tiles
from .ordering import WORD_LAST, pack, to_key, word_low, word_value


@triton.jit
def tile_sort_kernel(
    v_ptr, word_ptr, out_ptr, length_ptr, m, pitch, FORM: tl.constexpr, FROM_WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (rows, tiles): values v [rows, pitch] -> words [rows, m] sorted inside each tile; or FROM_WORDS: the first length[row] of
    the words [rows, m] likewise."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    o = first + tl.arange(0, BLOCK)
    if FROM_WORDS:
        n = tl.load(length_ptr + row)
        if first < n:
            word = tl.load(word_ptr + row * m + o, mask=o < n, other=WORD_LAST)
            tl.store(out_ptr + row * m + o, tl.sort(word), mask=o < n)
    else:
        v = tl.load(v_ptr + row * pitch + o, mask=o < m, other=0.0)
        low = 2 * o + (v < 0.0).to(tl.int32)
        if FORM == ODD:
            v = tl.abs(v)
        word = tl.where(o < m, pack(to_key(v), low), WORD_LAST)
        tl.store(out_ptr + row * m + o, tl.sort(word), mask=o < m)


@triton.jit
def split_point(a_ptr, length_a, b_ptr, length_b, diagonal):
    """How many of the first `diagonal` outputs of merge(a, b) come from a."""
    low = tl.maximum(diagonal - length_b, 0)
    high = tl.minimum(diagonal, length_a)
    while low < high:
        middle = (low + high) // 2
        from_a = tl.load(a_ptr + middle) <= tl.load(b_ptr + (diagonal - 1 - middle))
        low = tl.where(from_a, middle + 1, low)
        high = tl.where(from_a, high, middle)
    return low


@triton.jit
def merge_tile(base, n, run, first, BLOCK: tl.constexpr):
    """Sorted words [first, first + BLOCK) of the merge of neighbouring runs of the row of n words behind base."""
    start = first // (2 * run) * (2 * run)
    length_a = tl.minimum(run, n - start)
    length_b = tl.maximum(tl.minimum(run, n - start - length_a), 0)
    b = base + start + length_a
    diagonal = tl.minimum(first - start, length_a + length_b)
    i = split_point(base + start, length_a, b, length_b, diagonal)
    t = tl.arange(0, BLOCK)
    from_a = i + t
    from_b = diagonal - i + (BLOCK - 1 - t)
    head = tl.load(base + start + from_a, mask=from_a < length_a, other=WORD_LAST)
    tail = tl.load(b + from_b, mask=from_b < length_b, other=WORD_LAST)
    return tl.bitonic_merge(tl.minimum(head, tail))


@triton.jit
def merge_kernel(src_ptr, dst_ptr, length_ptr, m, run, LENGTHS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, tiles): one merge pass over words [rows, m], of which length[row] count where LENGTHS."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = m
    if LENGTHS:
        n = tl.load(length_ptr + row)
    if first < n:
        o = first + tl.arange(0, BLOCK)
        tl.store(dst_ptr + row * m + o, merge_tile(src_ptr + row * m, n, run, first, BLOCK), mask=o < n)


@triton.jit
def values_below(base, n, x, OR_EQUAL: tl.constexpr):
    """#{u < x}, or #{u <= x}, among the n sorted words behind base."""
    low = n * 0
    high = n
    while low < high:
        middle = (low + high) // 2
        u = word_value(tl.load(base + middle))
        below = (u <= x) if OR_EQUAL else (u < x)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def merge_sign_kernel(
    word_ptr, v_ptr, w_ptr, own_ptr, place_ptr, sign_ptr, part_ptr,
    m, run, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles): last merge of words [rows, m] in two runs -> signs [rows, pitch], cost of each tile [rows, tiles]."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    target = target_row(row, directions, frames, all_directions, first_direction)
    w_row, own_row, place_row = w_ptr + target * m, own_ptr + target * S, place_ptr + target * S
    t0, t1, t2, t3 = load_singles(v_ptr + row * pitch + m, S)
    i = first + tl.arange(0, BLOCK)
    word = merge_tile(word_ptr + row * m, m, run, first, BLOCK)
    u, low = word_value(word), word_low(word)
    c, d = compare_pairs(u, i, t0, t1, t2, t3, w_row, own_row, place_row, m, i < m, FORM, S, POWER)
    if FORM == ODD:
        d = tl.where((low & 1) == 1, -d, d)
    tl.store(sign_ptr + row * pitch + (low >> 1), d.to(sign_ptr.dtype.element_ty), mask=i < m)
    total = tl.sum(tl.where(i < m, c, 0.0), 0)
    if first == 0:
        a = word_ptr + row * m
        length_a = tl.minimum(run, m)
        length_b = m - length_a
        b = a + length_a
        for q in tl.static_range(S):
            t = single(q, t0, t1, t2, t3)
            at_most = values_below(a, length_a, t, True) + values_below(b, length_b, t, True)
            below_minus = values_below(a, length_a, -t, False) + values_below(b, length_b, -t, False)
            p = single_position(q, pairs_below_single(at_most, below_minus, m, FORM), t0, t1, t2, t3, S)
            y, _ = target_at(p, w_row, own_row, place_row, m, p >= 0, FORM, S)
            e = t - y
            tl.store(sign_ptr + row * pitch + m + q, slope(e, POWER).to(sign_ptr.dtype.element_ty))
            total += cost(e, POWER)
    tl.store(part_ptr + row * tl.num_programs(1) + tl.program_id(1), total)


def last_run(m: int, sort_block: int) -> int:
    """Length of the runs that the last merge starts from: with those of the tile sort doubled until two hold the row."""
    run = sort_block
    while 2 * run < m:
        run *= 2
    return run


def merged_runs(words: Tensor, scratch: Tensor, lengths: Tensor | None, c: configs.MergeConfig) -> tuple[Tensor, int]:
    """Merge tile-sorted words [rows, m] until two runs are left; -> the buffer that holds them and the length of a run."""
    rows, m = words.shape
    run, last = c.sort_block, last_run(m, c.sort_block)
    while run < last:
        merge_kernel[(rows, tiles(m, c.merge_block))](
            words, scratch, words if lengths is None else lengths, m, run,
            LENGTHS=lengths is not None, BLOCK=c.merge_block, num_warps=c.merge_warps,
        )  # fmt: skip
        words, scratch, run = scratch, words, 2 * run
    return words, run


def merge_fwd(
    v: Tensor,
    representatives: Tensor,
    own: Tensor,
    place: Tensor,
    form: int,
    power: int = 1,
    first_direction: int = 0,
    config: configs.MergeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Cost and derivatives of projected rows of any length, by tile sort and merge path.

    Arguments and results are those of `rows.rows_fwd`. Beside the results it allocates 16 bytes per representative of scratch and 4 per
    tile and row. Deterministic.
    """
    m, singles, frames = checked_rows(v, representatives, own, place, first_direction, form, power)
    samples, directions, pitch = v.shape
    rows = samples * directions
    sign = torch.empty(v.shape, dtype=sign_dtype(power), device=v.device)

    def run(c: configs.MergeConfig) -> Tensor:
        words = torch.empty(rows, m, dtype=torch.int64, device=v.device)
        tile_sort_kernel[(rows, tiles(m, c.sort_block))](
            v, words, words, words, m, pitch,
            FORM=form, FROM_WORDS=False, BLOCK=c.sort_block, num_warps=c.sort_warps,
        )  # fmt: skip
        words, length = merged_runs(words, torch.empty_like(words), None, c)
        part = torch.empty(rows, tiles(m, c.merge_block), dtype=torch.float32, device=v.device)
        merge_sign_kernel[(rows, tiles(m, c.merge_block))](
            words, v, representatives, own, place, sign, part,
            m, length, pitch, directions, frames, representatives.shape[1], first_direction,
            FORM=form, S=singles, POWER=power, BLOCK=c.merge_block, num_warps=c.merge_warps,
        )  # fmt: skip
        return part

    with guard(v):
        part = run(config or configs.choose("merge", m, architecture(v.device), run))
    return part.sum(-1, dtype=torch.float64).view(samples, directions), sign
