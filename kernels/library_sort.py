"""Rows sorted by `torch.sort`, compared with the sorted target by one kernel: the way to beat, and the one to take where it is not beaten.

Traffic, bytes per representative: 168 for torch.sort of float32 with int64 indices (six radix passes of long segments), then 12 + 4 read
and 1 written here. Memory: 32 bytes per representative at the peak of the sort, 12 while the kernel runs.
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


@triton.jit
def floats_below(base, n, x, OR_EQUAL: tl.constexpr):
    """#{u < x}, or #{u <= x}, among the n ascending float32 behind base, NaN last."""
    low = n * 0
    high = n + low
    while low < high:
        middle = (low + high) // 2
        u = tl.load(base + middle)
        below = (u <= x) if OR_EQUAL else (u < x)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def sorted_sign_kernel(
    u_ptr, order_ptr, v_ptr, w_ptr, own_ptr, place_ptr, sign_ptr, part_ptr,
    m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles): sorted values [rows, m] and where they came from -> signs [rows, pitch], cost of each tile [rows, tiles]."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    target = target_row(row, directions, frames, all_directions, first_direction)
    w_row, own_row, place_row = w_ptr + target * m, own_ptr + target * S, place_ptr + target * S
    v_row = v_ptr + row * pitch
    t0, t1, t2, t3 = load_singles(v_row + m, S)
    i = first + tl.arange(0, BLOCK)
    inside = i < m
    u = tl.load(u_ptr + row * m + i, mask=inside, other=0.0)
    column = tl.load(order_ptr + row * m + i, mask=inside, other=0).to(tl.int32)
    c, d = compare_pairs(u, i, t0, t1, t2, t3, w_row, own_row, place_row, m, inside, FORM, S, POWER)
    if FORM == ODD:
        d = tl.where(tl.load(v_row + column, mask=inside, other=0.0) < 0.0, -d, d)
    tl.store(sign_ptr + row * pitch + column, d.to(sign_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(inside, c, 0.0), 0)
    if first == 0:
        n = m + first
        for q in tl.static_range(S):
            t = single(q, t0, t1, t2, t3)
            at_most = floats_below(u_ptr + row * m, n, t, True)
            below_minus = floats_below(u_ptr + row * m, n, -t, False)
            p = single_position(q, pairs_below_single(at_most, below_minus, m, FORM), t0, t1, t2, t3, S)
            y, _ = target_at(p, w_row, own_row, place_row, m, p >= 0, FORM, S)
            e = t - y
            tl.store(sign_ptr + row * pitch + m + q, slope(e, POWER).to(sign_ptr.dtype.element_ty))
            total += cost(e, POWER)
    tl.store(part_ptr + row * tl.num_programs(1) + tl.program_id(1), total)


def sort_fwd(
    v: Tensor,
    representatives: Tensor,
    own: Tensor,
    place: Tensor,
    form: int,
    power: int = 1,
    first_direction: int = 0,
    config: configs.SortConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Cost and derivatives of projected rows of any length, by torch.sort.

    Arguments and results are those of `rows.rows_fwd`. Memory as the module's text says. Deterministic.
    """
    m, singles, frames = checked_rows(v, representatives, own, place, first_direction, form, power)
    samples, directions, pitch = v.shape
    rows = samples * directions
    sign = torch.empty(v.shape, dtype=sign_dtype(power), device=v.device)

    def run(c: configs.SortConfig) -> Tensor:
        values = v[..., :m].abs() if form == ODD.value else v[..., :m].contiguous()
        values, order = values.sort(-1)
        part = torch.empty(rows, tiles(m, c.block), dtype=torch.float32, device=v.device)
        sorted_sign_kernel[(rows, tiles(m, c.block))](
            values, order, v, representatives, own, place, sign, part,
            m, pitch, directions, frames, representatives.shape[1], first_direction,
            FORM=form, S=singles, POWER=power, BLOCK=c.block, num_warps=c.warps,
        )  # fmt: skip
        return part

    with guard(v):
        part = run(config or configs.choose("sort", m, architecture(v.device), run))
    return part.sum(-1, dtype=torch.float64).view(samples, directions), sign
