"""Amplitude and phase of feature maps on the CPU, and back from their derivatives to the maps: a few channels at a time, in cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vcd_fast.distance.bins import spectrum_floor
from vcd_fast.distance.spectrum import half_plane, half_plane_sizes, inverse_half_gradient

BLOCK_BINS = 1 << 17
"""bins of the channels treated together"""


ROW_VALUES = 16
"""a row of a matrix begins at a multiple of so many values, 64 bytes: products of such matrices take half the time"""


class Polar(NamedTuple):
    """The kept bins of a batch of feature maps: representatives first, as `bins.half_spectrum` has them."""

    z: Tensor
    """complex64 [B, C, m + s]"""
    amplitude: Tensor
    """[B, C, m + s]"""
    phase: Tensor | None
    """[B, C, m + s]; None where it is not wanted"""


def padded(length: int) -> int:
    """The next multiple of `ROW_VALUES`."""
    return -(-length // ROW_VALUES) * ROW_VALUES


def padded_rows(batch: int, rows: int, length: int) -> Tensor:
    """[batch, rows, length] float32 with whatever is there, each row beginning at a multiple of `ROW_VALUES`."""
    return torch.empty(batch, rows, padded(length))[..., :length]


def _blocks(batch: int, channels: int, bins: int) -> Iterator[tuple[int, slice]]:
    step = max(1, BLOCK_BINS // bins)
    for sample in range(batch):
        for first in range(0, channels, step):
            yield sample, slice(first, min(first + step, channels))


def _pieces(height: int, width: int) -> tuple[int, int, list[int], slice, list[int]]:
    """Of the half plane [H, W//2 + 1]: the first and the last interior column, the other columns, the rows of these that are
    representatives, and those that are self-conjugate."""
    edges = [0] if width % 2 else [0, width // 2]
    rows = [0] if height % 2 else [0, height // 2]
    return 1, (width + 1) // 2, edges, slice(1, (height + 1) // 2), rows


def to_polar(x: Tensor, norm: str, with_phase: bool) -> Polar:
    """Amplitude and phase of x [B, C, H, W] float32 at its kept bins: what `bins.half_spectrum` and `bins.part_values` say."""
    batch, channels, height, width = x.shape
    m, s = half_plane_sizes(height, width)
    z = torch.empty(batch, channels, m + s, dtype=torch.complex64)
    amplitude = padded_rows(batch, channels, m + s)
    phase = padded_rows(batch, channels, m + s) if with_phase else None
    first, last, edges, upper, rows = _pieces(height, width)
    floor = spectrum_floor(x.dtype)
    for sample, some in _blocks(batch, channels, m + s):
        plane, kept, size = torch.fft.rfft2(x[sample, some], norm=norm), z[sample, some], amplitude[sample, some]
        at = height * (last - first)
        kept[:, :at].unflatten(-1, (height, last - first)).copy_(plane[..., first:last])
        for column in edges:
            piece = plane[:, upper, column]
            kept[:, at : at + piece.shape[-1]] = piece
            at += piece.shape[-1]
        for column in edges:
            for row in rows:
                kept[:, at] = plane[:, row, column].real + 0j
                at += 1
        kept.view(torch.float32)[..., 1::2] += 0.0  # -0 becomes 0
        torch.abs(kept, out=size)
        if size.amin() < floor:
            vanishing = size < floor
            kept.masked_fill_(vanishing, 0)
            size.masked_fill_(vanishing, 0)
        if phase is not None:
            torch.angle(kept, out=phase[sample, some])
    return Polar(z, amplitude, phase)


def from_polar(
    polar: Polar, amplitude: Tensor | None, phase: Tensor | None, height: int, width: int, norm: str
) -> Tensor:
    """The gradient with respect to the maps [B, C, H, W], from those with respect to amplitude and phase [B, C, m + s] (None: zero).

    d|z| = Re(z̄ dz)/|z| and d angle = Im(z̄ dz)/|z|², both taken as 0 at z = 0. The arguments are overwritten.
    """
    batch, channels, bins = polar.z.shape
    gradient = torch.empty(batch, channels, height, width)
    geometry = half_plane(height, width)
    first, last, edges, upper, rows = _pieces(height, width)
    for sample, some in _blocks(batch, channels, bins):
        z = torch.view_as_real(polar.z[sample, some])
        size = polar.amplitude[sample, some]
        inverse = size.reciprocal()
        if size.amin() == 0:
            inverse.masked_fill_(size == 0, 0)
        half = torch.empty_like(z)  # half the gradient: a pair's other half stands at the mirror image
        inverse *= 0.5
        if amplitude is not None:
            along = amplitude[sample, some].mul_(inverse)
            torch.mul(z, along.unsqueeze(-1), out=half)
        else:
            half.zero_()
        if phase is not None:
            around = phase[sample, some].mul_(inverse).mul_(inverse).mul_(2)
            half[..., 0].addcmul_(z[..., 1], around, value=-1)
            half[..., 1].addcmul_(z[..., 0], around)
        half = torch.view_as_complex(half)
        plane = torch.empty(half.shape[0], height, geometry.half_width, dtype=half.dtype)
        at = height * (last - first)
        plane[..., first:last] = half[:, :at].unflatten(-1, (height, last - first))
        for column in edges:
            piece = half[:, at : at + upper.stop - upper.start]
            plane[:, upper, column] = piece
            # not the lazy conj(): copying it loses the conjugate where torch.compile runs an operator for the first time
            plane[:, height - upper.stop + 1 :, column] = piece.flip(-1).conj_physical()
            at += piece.shape[-1]
        for column in edges:
            for row in rows:
                plane[:, row, column] = 2 * half[:, at].real + 0j
                at += 1
        gradient[sample, some] = inverse_half_gradient(plane, height, width, norm)
    return gradient
