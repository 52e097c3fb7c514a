"""The paper's ablation without optimal transport: the Euclidean norm of the difference of all coefficients (Eq. 4)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vcd_fast.distance.bins import half_spectrum, part_values
from vcd_fast.distance.config import SlicingConfig
from vcd_fast.distance.spectrum import half_plane_sizes
from vcd_fast.distance.target import compute_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class EuclideanTarget:
    """The fixed side: amplitude and phase of a batch of feature maps (or the maps themselves), on the half plane."""

    parts: tuple[Tensor, ...]
    """each [B, C, n] in the order of `config.parts`"""
    config: SlicingConfig
    shape: tuple[int, int, int]

    @property
    def batch_size(self) -> int:
        return self.parts[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device | str) -> EuclideanTarget:
        return dataclasses.replace(self, parts=tuple(part.to(device) for part in self.parts))

    def __getitem__(self, samples: slice) -> EuclideanTarget:
        return dataclasses.replace(self, parts=tuple(part[samples] for part in self.parts))


def _values(x: Tensor, config: SlicingConfig) -> list[Tensor]:
    """Coefficients [B, C, n] of each part, scaled so that their Euclidean norm is that of the full plane."""
    if config.domain == "feature":
        return [x.flatten(2)]
    z = half_spectrum(x, config.fft_norm)
    scale = torch.ones(z.shape[-1], dtype=x.dtype, device=x.device)
    scale[: half_plane_sizes(*x.shape[-2:])[0]] = 2**0.5  # a representative counts for two equal squares
    return [part_values(z, part) * scale for part in config.parts]


def euclidean_target(y: Tensor, config: SlicingConfig) -> EuclideanTarget:
    """y [B, C, H, W] -> its fixed side."""
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        parts = _values(y.detach().to(compute_dtype(y)), config)
    return EuclideanTarget(tuple(parts), config, tuple(y.shape[1:]))


def euclidean_terms(x: Tensor, target: EuclideanTarget) -> tuple[Tensor, Tensor]:
    """‖x - y‖₂ of each part. Shapes and batch rule as `sliced.sliced_terms`; the gradient at x = y is 0."""
    with torch.autocast(x.device.type, enabled=False):
        terms = []
        for values, fixed in zip(_values(x.to(target.dtype), target.config), target.parts, strict=True):
            difference = values.unflatten(0, (target.batch_size, -1)) - fixed.unsqueeze(1)
            terms.append(torch.linalg.vector_norm(difference, dim=(-1, -2)).flatten())
        total = sum(weight * term for weight, term in zip(target.config.part_weights, terms, strict=True))
        return total, torch.stack(terms, -1).detach()
