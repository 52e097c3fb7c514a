"""From feature maps to lists of projected values, in half form: what is compared, on either side.

In the frequency domain the channel and flat readings need only the m representative bins, each standing for two coefficients, and the s
self-conjugate ones (see `spectrum`). Amplitudes are even: a representative stands for (v, v). Phases are odd: for (v, -v), except on the
branch cut (`phase_is_odd`). Lists without such symmetry are whole.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vcd_fast.distance.backends.polar import to_polar
from vcd_fast.distance.bins import full_plane, half_spectrum, mirrored_values, part_values
from vcd_fast.distance.config import SlicingConfig
from vcd_fast.distance.precision import exact_conv2d, exact_matmul
from vcd_fast.distance.spectrum import half_plane_sizes

Form = Literal["even", "odd", "whole"]
"""what a representative v stands for: (v, v), (v, -v), or itself"""

LARGEST_WHOLE_PHASE = 4096
"""On a GPU, where the spectrum cannot be looked at without waiting for it, phases of maps up to this many bins are kept whole."""


class Lists(NamedTuple):
    """One list per sample and direction: its values, in half form or whole."""

    representatives: Tensor
    """[B, K, m]"""
    self_conjugate: Tensor
    """[B, K, s]; s = 0 where the list is kept whole"""
    form: Form

    @property
    def length(self) -> int:
        """n, the values of a full list"""
        copies = 1 if self.form == "whole" else 2
        return copies * self.representatives.shape[-1] + self.self_conjugate.shape[-1]


class Samples(NamedTuple):
    """What is projected: points in R^C, along the last dimension."""

    values: Tensor
    """[B, C, n]: representatives, then self-conjugate bins"""
    singles: int
    """s, how many of them are self-conjugate"""
    form: Form


def phase_is_odd(z: Tensor) -> bool:
    """Whether angle(conj z) = -angle(z) at all of the bins: none on the branch cut, where both are +π (see `bins.mirrored_values`).

    On a GPU this would wait for the spectrum. There it is taken for granted of large maps, where the convention decides between +π and
    -π for bins whose imaginary part is exactly 0, which is up to the rounding of the FFT anyway. A compiler may not look either; whole
    lists are right in any case.
    """
    if torch.compiler.is_compiling():
        return False
    if z.device.type != "cpu":
        return z.shape[-1] > LARGEST_WHOLE_PHASE // 2
    return not bool(((z.imag == 0) & (z.real < 0)).any())


def spectrum_samples(z: Tensor, values: Tensor, part: str, config: SlicingConfig, height: int, width: int) -> Samples:
    """`values`, the amplitudes or phases of the kept bins z [B, C, m + s], as they are projected.

    A whole list of phases holds the kept bins, then the mirror images of the representatives; that of the patch reading is the plane in
    FFT order.
    """
    m, s = half_plane_sizes(height, width)
    if config.slicing == "patch":
        return Samples(
            full_plane(values, mirrored_values(values, z, part)[..., :m], height, width).flatten(2), 0, "whole"
        )
    if part == "phase" and not phase_is_odd(z[..., :m]):
        return Samples(torch.cat([values, mirrored_values(values, z, part)[..., :m]], -1), 0, "whole")
    return Samples(values, s, "odd" if part == "phase" else "even")


def project(samples: Samples, config: SlicingConfig, projections: Tensor | None, height: int, width: int) -> Tensor:
    """[B, C, n] -> [B, K, n], representatives first (patch: [B, K, n'] of the plane); flat: all coefficients as one, [B, 1, C·n]."""
    values, singles, _ = samples
    if config.slicing == "channel":
        return exact_matmul(projections, values)
    if config.slicing == "flat":
        split = values.shape[-1] - singles
        return torch.cat([values[..., :split].flatten(1), values[..., split:].flatten(1)], -1).unsqueeze(1)
    filters = projections.unflatten(1, (values.shape[1], config.patch_size, config.patch_size))
    return exact_conv2d(values.unflatten(-1, (height, width)), filters).flatten(2)


def split(projected: Tensor, samples: Samples, config: SlicingConfig) -> Lists:
    """What `project` made of `samples` as lists."""
    singles = samples.singles * (samples.values.shape[1] if config.slicing == "flat" else 1)
    m = projected.shape[-1] - singles
    return Lists(projected[..., :m], projected[..., m:], samples.form)


def projected_lists(x: Tensor, config: SlicingConfig, projections: Tensor | None) -> list[Lists]:
    """What is to be sorted, for each of `config.parts`; differentiable in plain PyTorch.

    x is [B, C, H, W], float32 or float64.
    """
    height, width = x.shape[-2:]
    if config.domain == "feature":
        samples = [Samples(x.flatten(2), 0, "whole")]
    elif x.device.type == "cpu" and x.dtype == torch.float32 and not (x.requires_grad or torch.compiler.is_compiling()):
        # what the CPU backend does, bit by bit: equal maps then have equal spectra to the last digit
        z, amplitude, phase = to_polar(x, config.fft_norm, "phase" in config.parts)
        values = {"amplitude": amplitude, "phase": phase}
        samples = [spectrum_samples(z, values[part], part, config, height, width) for part in config.parts]
    else:
        z = half_spectrum(x, config.fft_norm)
        samples = [spectrum_samples(z, part_values(z, part), part, config, height, width) for part in config.parts]
    return [split(project(s, config, projections, height, width), s, config) for s in samples]
