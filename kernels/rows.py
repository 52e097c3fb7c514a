"""Short rows: a row is sorted and compared with the sorted target by one program; only its cost and signs are written.

Every program sorts 64-bit words (order-preserving key above, index below) in registers, so the permutation comes with the sort and NaN
cannot lose an element. Two kernels do the same to rows that come from different places: `rows_kernel` reads projected values,
`project_rows_kernel` projects 16 directions itself, so that the projected values never exist in memory.

Traffic of `rows_kernel`, bytes per representative: 4 (values) + 4 (target) read, 1 written (4 for p = 2).
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
from .launch import (
    architecture,
    checked,
    checked_extent,
    checked_precision,
    checked_rows,
    checked_target,
    guard,
    row_pitch,
    sign_dtype,
)
from .ordering import WORD_LAST, pack, to_key, word_low, word_value
from .polar import load_complex, modulus_and_angle


@triton.jit
def compare_rows(
    v, t0, t1, t2, t3, in_range, w_row, own_row, place_row, sign_row, m,
    FORM: tl.constexpr, S: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort v [R, BLOCK], compare, write the derivatives behind sign_row; -> cost [R]. in_range [R, 1]; pointers scalar or [R, 1]."""
    i = tl.arange(0, BLOCK)[None, :] + tl.zeros_like(v).to(tl.int32)
    pair = i < m
    negative = (v < 0.0).to(tl.int32)
    if FORM == ODD:
        v = tl.abs(v)
    word = tl.sort(tl.where(pair, pack(to_key(v), 2 * i + negative), WORD_LAST))
    u, low = word_value(word), word_low(word)
    use = pair & in_range
    c, d = compare_pairs(u, i, t0, t1, t2, t3, w_row, own_row, place_row, m, use, FORM, S, POWER)
    if FORM == ODD:
        d = tl.where((low & 1) == 1, -d, d)
    tl.store(sign_row + (low >> 1), d.to(sign_row.dtype.element_ty), mask=use)
    total = tl.sum(tl.where(use, c, 0.0), 1)
    for q in tl.static_range(S):
        t = single(q, t0, t1, t2, t3)
        at_most = tl.sum((use & (u <= t)).to(tl.int32), 1)[:, None]
        below_minus = tl.sum((use & (u < -t)).to(tl.int32), 1)[:, None]
        p = single_position(q, pairs_below_single(at_most, below_minus, m, FORM), t0, t1, t2, t3, S)
        y, _ = target_at(p, w_row, own_row, place_row, m, in_range, FORM, S)
        e = t - y
        tl.store(sign_row + (m + q + 0 * p), slope(e, POWER).to(sign_row.dtype.element_ty), mask=in_range)
        total += tl.sum(tl.where(in_range, cost(e, POWER), 0.0), 1)
    return total


@triton.jit
def rows_kernel(
    v_ptr, w_ptr, own_ptr, place_ptr, sign_ptr, cost_ptr, m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (samples · directions,): row of v [samples, directions, pitch] -> sign row, cost [samples · directions]."""
    row = tl.program_id(0).to(tl.int64)
    target = target_row(row, directions, frames, all_directions, first_direction)
    o = tl.arange(0, BLOCK)[None, :]
    v = tl.load(v_ptr + row * pitch + o, mask=o < m, other=0.0)
    t0, t1, t2, t3 = load_singles(v_ptr + row * pitch + m, S)
    total = compare_rows(
        v, t0, t1, t2, t3, tl.full((1, 1), 1, tl.int1), w_ptr + target * m, own_ptr + target * S, place_ptr + target * S,
        sign_ptr + row * pitch, m, FORM, S, POWER, BLOCK,
    )  # fmt: skip
    tl.store(cost_ptr + row + tl.arange(0, 1), total)


@triton.jit
def column(v, j, BLOCK: tl.constexpr):
    """v [R, BLOCK] at column j -> [R, 1]."""
    return tl.sum(tl.where(tl.arange(0, BLOCK)[None, :] == j, v, 0.0), 1)[:, None]


@triton.jit
def project_rows_kernel(
    z_ptr, index_ptr, r_ptr, w_ptr, own_ptr, place_ptr, sign_ptr, cost_ptr,
    C, plane, m, pitch, directions, frames, all_directions, first_direction,
    FORM: tl.constexpr, S: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(directions, BLOCK_R), samples): half spectrum z [samples, C, plane] -> what `rows_kernel` writes."""
    sample = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK)
    z_ptr += sample * C * plane
    bins = tl.load(index_ptr + j, mask=j < m + S, other=0)
    v = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (j < m + S)[None, :]
        re, im = load_complex(z_ptr, c[:, None] * plane + bins[None, :], inside)
        im = tl.where((j >= m)[None, :], 0.0, im)
        modulus, angle = modulus_and_angle(re, im)
        r = tl.load(r_ptr + k[:, None] * C + c[None, :], mask=(k < directions)[:, None] & (c < C)[None, :], other=0.0)
        v = tl.dot(r, angle if FORM == ODD else modulus, v, input_precision=PRECISION)
    in_range = (k < directions)[:, None]
    row = tl.where(k < directions, k, 0)[:, None]
    target = sample // frames * all_directions + first_direction
    t0 = column(v, m, BLOCK)
    t1, t2, t3 = t0, t0, t0
    if S > 1:
        t1 = column(v, m + 1, BLOCK)
    if S > 2:
        t2 = column(v, m + 2, BLOCK)
        t3 = column(v, m + 3, BLOCK)
    total = compare_rows(
        v, t0, t1, t2, t3, in_range,
        w_ptr + target * m + row * m, own_ptr + target * S + row * S, place_ptr + target * S + row * S,
        sign_ptr + sample * directions * pitch + row * pitch, m, FORM, S, POWER, BLOCK,
    )  # fmt: skip
    tl.store(cost_ptr + sample * directions + k, total, mask=k < directions)


def rows_fwd(
    v: Tensor,
    representatives: Tensor,
    own: Tensor,
    place: Tensor,
    form: int,
    power: int = 1,
    first_direction: int = 0,
    config: configs.RowsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Cost and derivatives of projected rows of at most 4096 representatives.

    Args:
        v: float32 [samples, directions, pitch], contiguous; m representatives, then S single values, then padding of any content.
        representatives, own, place: the target, see `launch.checked_rows` and `half_list`.
        form: `half_list.PLAIN`, `EVEN` or `ODD`. power: exponent p of the cost, 1 or 2.
        first_direction: where the chunk's directions start among the target's.
        config: block size and warps in place of the table's.

    Returns:
        cost float32 [samples, directions], the sum over all n values of |x_(j) - y_(j)|^p, and its derivative with respect to every
        value of v, summed over what the value stands for: [samples, directions, pitch], int8 in -2..2 (float32 for p = 2); what
        follows the m + S values of a row is undefined. Allocates these two. Deterministic.
    """
    m, singles, frames = checked_rows(v, representatives, own, place, first_direction, form, power)
    samples, directions, pitch = v.shape
    sign = torch.empty(v.shape, dtype=sign_dtype(power), device=v.device)
    total = torch.empty(samples, directions, dtype=torch.float32, device=v.device)

    def run(c: configs.RowsConfig) -> None:
        rows_kernel[(samples * directions,)](
            v, representatives, own, place, sign, total, m, pitch, directions, frames, representatives.shape[1], first_direction,
            FORM=form, S=singles, POWER=power, BLOCK=c.block, num_warps=c.warps,
        )  # fmt: skip

    with guard(v):
        run(config or configs.choose("rows", m, architecture(v.device), run))
    return total, sign


def project_rows_fwd(
    z: Tensor,
    index: Tensor,
    directions: Tensor,
    representatives: Tensor,
    own: Tensor,
    place: Tensor,
    form: int,
    power: int = 1,
    precision: str = "ieee",
    first_direction: int = 0,
    config: configs.RowsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`project.project_fwd` and `rows_fwd` in one kernel, for short rows.

    Args:
        z: int64 view of complex64 [samples, C, H·(W//2 + 1)], contiguous. index: int32 [m + S], see `project.project_fwd`.
        directions: float32 [directions, C], the chunk's. form: `EVEN` compares amplitudes, `ODD` phases.
        The others as in `rows_fwd`; `config.block` must hold m + S.

    Returns:
        As `rows_fwd`. Allocates nothing else. Deterministic.
    """
    checked("z", z, torch.int64, (None, None, None), z.device)
    samples, channels, plane = z.shape
    checked("directions", directions, torch.float32, (None, channels), z.device)
    chunk = directions.shape[0]
    m, singles, frames = checked_target(
        samples, chunk, z.device, representatives, own, place, first_direction, form, power
    )
    checked("index", index, torch.int32, (m + singles,), z.device)
    checked_precision(precision, z.device)
    checked_extent("z", channels, plane)
    pitch = row_pitch(m + singles)
    sign = torch.empty(samples, chunk, pitch, dtype=sign_dtype(power), device=z.device)
    total = torch.empty(samples, chunk, dtype=torch.float32, device=z.device)

    def run(c: configs.RowsConfig) -> None:
        project_rows_kernel[(triton.cdiv(chunk, c.block_r), samples)](
            z, index, directions, representatives, own, place, sign, total,
            channels, plane, m, pitch, chunk, frames, representatives.shape[1], first_direction,
            FORM=form, S=singles, POWER=power, PRECISION=precision,
            BLOCK=c.block, BLOCK_R=c.block_r, BLOCK_C=c.block_c, num_warps=c.warps, enable_fp_fusion=True,
        )  # fmt: skip

    with guard(z):
        c = config or configs.choose("project_rows", m, architecture(z.device), run)
        if c.block < m + singles:
            raise ValueError(f"config.block must hold a row of {m + singles} values, got {c.block}")
        run(c)
    return total, sign
