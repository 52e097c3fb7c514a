"""Derivatives of the projected rows -> gradient of the half spectrum: Rᵀ·sign and the derivative of modulus and angle in one kernel.

    g_a[c, j] = sum_k R[k, c] s_a[k, j],  g_p likewise;     dL/dZ = g_a Z/|Z| + g_p iZ/|Z|²        (0 where Z = 0)

It is written the way `irfft2` reads it: half of it at a representative, the conjugate of that half at the mirror image in columns 0 and
W/2, and the real part of the amplitude's at a self-conjugate bin, whose phase does not move. Chunks of directions are added in the
order of the launches, so the sum is always the same.

Traffic: 1 byte per sign and part per block of channels (4 for p = 2), 8 per channel and bin read, 8 written (16 more where a chunk
is added).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config as configs
from .launch import architecture, checked, checked_extent, checked_precision, guard
from .polar import complex_word, load_complex, polar_gradient


@triton.jit
def spectrum_bwd_kernel(
    z_ptr, index_ptr, mirror_ptr, r_ptr, a_ptr, p_ptr, g_ptr, amplitude_scale, phase_scale, C, K, plane, m, kept, a_pitch, p_pitch,
    AMPLITUDE: tl.constexpr, PHASE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(kept, BLOCK_J), cdiv(C, BLOCK_C), samples)."""
    sample = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    z_ptr += sample * C * plane  # offsets inside a sample fit 32 bits, which the launcher checks
    g_ptr += sample * C * plane
    a_ptr += sample * K * a_pitch
    p_ptr += sample * K * p_pitch
    a = tl.zeros((BLOCK_C, BLOCK_J), tl.float32)
    p = tl.zeros((BLOCK_C, BLOCK_J), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        r = tl.trans(tl.load(r_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0))
        inside = (k < K)[:, None] & (j < kept)[None, :]
        if AMPLITUDE:
            s = tl.load(a_ptr + k[:, None] * a_pitch + j[None, :], mask=inside, other=0).to(tl.float32)
            a = tl.dot(r, s, a, input_precision=PRECISION)
        if PHASE:
            s = tl.load(p_ptr + k[:, None] * p_pitch + j[None, :], mask=inside, other=0).to(tl.float32)
            p = tl.dot(r, s, p, input_precision=PRECISION)
    bins = tl.load(index_ptr + j, mask=j < kept, other=0)
    inside = (c < C)[:, None] & (j < kept)[None, :]
    o = c[:, None] * plane + bins[None, :]
    re, im = load_complex(z_ptr, o, inside)
    alone = (j >= m)[None, :]
    im = tl.where(alone, 0.0, im)
    d_re, d_im = polar_gradient(re, im, a * amplitude_scale, tl.where(alone, 0.0, p * phase_scale))
    d_re = tl.where(alone, d_re, 0.5 * d_re)
    d_im = tl.where(alone, 0.0, 0.5 * d_im)
    if ACCUMULATE:
        so_far_re, so_far_im = load_complex(g_ptr, o, inside)
        d_re += so_far_re
        d_im += so_far_im
    tl.store(g_ptr + o, complex_word(d_re, d_im), mask=inside)
    mirror = tl.load(mirror_ptr + j, mask=j < kept, other=-1)
    o = c[:, None] * plane + mirror[None, :]
    tl.store(g_ptr + o, complex_word(d_re, -d_im), mask=inside & (mirror >= 0)[None, :])


def spectrum_bwd(
    z: Tensor,
    index: Tensor,
    mirror: Tensor,
    directions: Tensor,
    amplitude_sign: Tensor | None,
    phase_sign: Tensor | None,
    representatives: int,
    amplitude_scale: float,
    phase_scale: float,
    gradient: Tensor,
    accumulate: bool,
    precision: str = "ieee",
    config: configs.GradientConfig | None = None,
) -> None:
    """Write, or add a chunk of directions to, the gradient of the half spectrum.

    Args:
        z, index, directions, representatives, precision: as in `project.project_fwd`, directions being the chunk's [K, C].
        mirror: int32 [m + S], where the conjugate of a kept bin stands in the half plane, -1 where it does not.
        amplitude_sign, phase_sign: [samples, K, at least m + S], contiguous, int8 or float32, from the comparison of rows; None for a
            part that does not count.
        amplitude_scale, phase_scale: factors of the two parts (weight / (n · all directions)).
        gradient: int64 view of complex64 [samples, C, plane], contiguous; written. Every bin of it is written once.
        accumulate: add to what `gradient` holds.

    Allocates nothing. Deterministic.
    """
    checked("z", z, torch.int64, (None, None, None), z.device)
    samples, channels, plane = z.shape
    checked("gradient", gradient, torch.int64, tuple(z.shape), z.device)
    checked("index", index, torch.int32, (None,), z.device)
    kept = index.shape[0]
    checked("mirror", mirror, torch.int32, (kept,), z.device)
    checked("directions", directions, torch.float32, (None, channels), z.device)
    count = directions.shape[0]
    given = [s for s in (amplitude_sign, phase_sign) if s is not None]
    if not given:
        raise ValueError("amplitude_sign or phase_sign must be given, got None for both")
    for sign in given:
        checked(
            "signs", sign, torch.float32 if sign.is_floating_point() else torch.int8, (samples, count, None), z.device
        )
        if sign.shape[-1] < kept:
            raise ValueError(f"signs must hold {kept} values a row, got {sign.shape[-1]}")
        checked_extent("signs", count, sign.shape[-1])
    a, p = (given[0] if sign is None else sign for sign in (amplitude_sign, phase_sign))
    checked_precision(precision, z.device)
    checked_extent("z", channels, plane)

    def launch(c: configs.GradientConfig, out: Tensor) -> None:
        spectrum_bwd_kernel[(triton.cdiv(kept, c.block_j), triton.cdiv(channels, c.block_c), samples)](
            z, index, mirror, directions, a, p, out, float(amplitude_scale), float(phase_scale),
            channels, count, plane, representatives, kept, a.shape[-1], p.shape[-1],
            AMPLITUDE=amplitude_sign is not None, PHASE=phase_sign is not None, ACCUMULATE=accumulate, PRECISION=precision,
            BLOCK_C=c.block_c, BLOCK_J=c.block_j, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=True,
        )  # fmt: skip

    with guard(z):
        found = config or configs.choose(
            "spectrum_gradient",
            representatives,
            architecture(z.device),
            lambda c: launch(c, torch.empty_like(gradient)),
        )
        launch(found, gradient)
