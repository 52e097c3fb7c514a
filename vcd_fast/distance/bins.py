"""Amplitude and phase at the kept bins of a real map: its representatives, then its self-conjugate bins, along one axis."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vcd_fast.distance.spectrum import half_plane


def spectrum_floor(dtype: torch.dtype) -> float:
    """Magnitude below which a bin counts as zero: its square would underflow, and with it the derivative of the angle."""
    return torch.finfo(dtype).tiny ** 0.5


def half_spectrum(x: Tensor, norm: str) -> Tensor:
    """The kept bins of the FFT of real x [.., H, W] -> complex [.., m + s], representatives first; differentiable.

    Zeros are made +0: in the imaginary part of self-conjugate bins, where they are exact, in imaginary parts that an FFT rounds to -0
    (a negative real bin has the angle +π, never -π), and in bins of a magnitude below `spectrum_floor` (amplitude, phase and both
    gradients are 0 there).
    """
    plane = half_plane(x.shape[-2], x.shape[-1], x.device)
    z = torch.fft.rfft2(x, norm=norm).flatten(-2)
    z, alone = z.index_select(-1, plane.representatives), z.index_select(-1, plane.self_conjugate)
    real = torch.cat([z.real, alone.real], -1)
    z = torch.complex(real, torch.cat([z.imag + 0.0, torch.zeros_like(alone.real)], -1))
    return torch.where(z.abs() < spectrum_floor(x.dtype), torch.zeros((), dtype=z.dtype, device=z.device), z)


def part_values(z: Tensor, part: str) -> Tensor:
    """ "amplitude" or "phase" of complex bins, both with gradient 0 where z = 0."""
    return z.abs() if part == "amplitude" else z.angle()


def mirrored_values(values: Tensor, z: Tensor, part: str) -> Tensor:
    """`part_values` at the mirror images of the bins, conj z.

    The phase is odd except on its branch cut: the angle lies in (-π, π], so a negative real bin and its mirror image both have +π.
    Channels with one active pixel, say, put many bins there.
    """
    if part == "amplitude":
        return values
    on_cut = (z.imag == 0) & (z.real < 0)
    return torch.where(on_cut, values, -values)


@functools.lru_cache(maxsize=64)
def mirror_index(height: int, width: int) -> Tensor:
    """[H·W] int64: where every bin of the full plane is found in [kept bins, mirror images of the representatives]."""
    plane = half_plane(height, width)
    m, s = len(plane.representatives), len(plane.self_conjugate)
    at = torch.cat([plane.representatives, plane.self_conjugate])
    full = torch.full((height, width), -1)
    full[at // plane.half_width, at % plane.half_width] = torch.arange(m + s)
    mirrored = full.flip(-2, -1).roll((1, 1), (-2, -1)) + m + s
    return torch.where(full >= 0, full, mirrored).flatten()


def full_plane(values: Tensor, mirrored: Tensor, height: int, width: int) -> Tensor:
    """Values at the kept bins [.., m + s] and at the mirror images of the representatives [.., m] -> [.., H, W] in FFT order."""
    every = torch.cat([values, mirrored], -1)
    return every.index_select(-1, mirror_index(height, width).to(values.device)).unflatten(-1, (height, width))
