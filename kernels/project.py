"""Half spectrum -> amplitudes and phases -> their projections on K directions, in one pass over the spectrum.

    a[b, k, j] = sum_c R[k, c] |Z[b, c, index_j]|          p[b, k, j] = sum_c R[k, c] angle(Z[b, c, index_j])

for the m + S bins of the half plane that a row keeps (representatives first). Neither amplitudes nor phases exist in memory. A row may
go on with the mirror images of the representatives, for phases that are to be compared without taking them for odd: angle(conj z) is
-angle(z), but +pi on the branch cut, like angle(z).

Traffic: the spectrum, 8 bytes per channel and bin, is read once per block of directions (from L2 after the first); 4 bytes per
projected value and part are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config as configs
from .launch import architecture, checked, checked_extent, checked_precision, guard, row_pitch
from .polar import load_complex, modulus_and_angle


@triton.jit
def project_fwd_kernel(
    z_ptr, index_ptr, r_ptr, a_ptr, p_ptr, C, K, plane, m, singles, kept, pitch,
    AMPLITUDE: tl.constexpr, PHASE: tl.constexpr, MIRRORED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(kept, BLOCK_J), cdiv(K, BLOCK_K), samples)."""
    sample = tl.program_id(2).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    z_ptr += sample * C * plane  # offsets inside a sample fit 32 bits, which the launcher checks
    bins = tl.load(index_ptr + j, mask=j < kept, other=0)
    alone = (j >= m) & (j < m + singles)
    a = tl.zeros((BLOCK_K, BLOCK_J), tl.float32)
    p = tl.zeros((BLOCK_K, BLOCK_J), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (j < kept)[None, :]
        re, im = load_complex(z_ptr, c[:, None] * plane + bins[None, :], inside)
        im = tl.where(alone[None, :], 0.0, im)  # self-conjugate bins are real, whatever the FFT rounded to
        modulus, angle = modulus_and_angle(re, im)
        if MIRRORED:
            angle = tl.where((j >= m + singles)[None, :] & ((im != 0.0) | (re >= 0.0)), -angle, angle)
        r = tl.load(r_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)
        if AMPLITUDE:
            a = tl.dot(r, modulus, a, input_precision=PRECISION)
        if PHASE:
            p = tl.dot(r, angle, p, input_precision=PRECISION)
    o = k[:, None] * pitch + j[None, :]
    inside = (k < K)[:, None] & (j < kept)[None, :]
    if AMPLITUDE:
        tl.store(a_ptr + sample * K * pitch + o, a, mask=inside)
    if PHASE:
        tl.store(p_ptr + sample * K * pitch + o, p, mask=inside)


def project_fwd(
    z: Tensor,
    index: Tensor,
    directions: Tensor,
    representatives: int,
    singles: int,
    amplitude: bool = True,
    phase: bool = True,
    precision: str = "ieee",
    config: configs.ProjectConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Projections of amplitudes and of phases.

    Args:
        z: int64 view of complex64 [samples, C, H·(W//2 + 1)], contiguous.
        index: int32 [m + S], positions of the kept bins in the half plane, the m representatives first, then the S self-conjugate ones
            (whose imaginary part is ignored, so that their phase is 0 or +pi); or [2m + S], the representatives once more, for
            their mirror images.
        directions: float32 [K, C], contiguous. representatives: m. singles: S.
        amplitude, phase: which of the two to compute; the other is returned empty.
        precision: 'ieee', 'tf32x3' or 'tf32', see `launch.checked_precision`.
        config: tile and warps in place of the table's.

    Returns:
        Two float32 tensors [samples, K, pitch], pitch = len(index) rounded up to a multiple of 16; the padding is undefined. Allocates
        these: 4·samples·K·pitch bytes each. Deterministic.
    """
    checked("z", z, torch.int64, (None, None, None), z.device)
    samples, channels, plane = z.shape
    checked("index", index, torch.int32, (None,), z.device)
    checked("directions", directions, torch.float32, (None, channels), z.device)
    kept, count = index.shape[0], directions.shape[0]
    if kept not in (representatives + singles, 2 * representatives + singles):
        raise ValueError(
            f"index must name {representatives} + {singles} bins, or the first of them twice, got {kept} entries"
        )
    checked_precision(precision, z.device)
    pitch = row_pitch(kept)
    checked_extent("z", channels, plane)
    checked_extent("the projections", count, pitch)
    a, p = (
        torch.empty((samples, count, pitch) if wanted else (0, count, pitch), dtype=torch.float32, device=z.device)
        for wanted in (amplitude, phase)
    )

    def run(c: configs.ProjectConfig) -> None:
        project_fwd_kernel[(triton.cdiv(kept, c.block_j), triton.cdiv(count, c.block_k), samples)](
            z, index, directions, a, p, channels, count, plane, representatives, singles, kept, pitch,
            AMPLITUDE=amplitude, PHASE=phase, MIRRORED=kept > representatives + singles, PRECISION=precision,
            BLOCK_K=c.block_k, BLOCK_J=c.block_j, BLOCK_C=c.block_c, num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=True,
        )  # fmt: skip

    with guard(z):
        run(config or configs.choose("project", representatives, architecture(z.device), run))
    return a, p
