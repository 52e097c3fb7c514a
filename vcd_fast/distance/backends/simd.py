"""The sliced Wasserstein distance on the CPU in float32, with its gradient in one go: half spectrum, bounded memory.

FFT, amplitude, phase and projections are PyTorch's; rows are sorted and compared in machine code or NumPy (`rows`). A chunk of directions
is projected, compared and projected back before the next; what is kept is the gradient with respect to the bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vcd_fast.distance.backends import reference
from vcd_fast.distance.backends.polar import from_polar, padded, padded_rows, to_polar
from vcd_fast.distance.backends.rows import compare
from vcd_fast.distance.bins import mirror_index
from vcd_fast.distance.config import SlicingConfig
from vcd_fast.distance.lists import Lists, Samples, project, spectrum_samples
from vcd_fast.distance.precision import exact_conv_transpose2d, exact_matmul, may_round
from vcd_fast.distance.spectrum import half_plane_sizes
from vcd_fast.distance.target import SortedTarget

CHUNK_VALUES = 1 << 22
"""projected values held at a time, 16 MB"""
SMALL_ROW = 128
"""values of a full list up to which sorting them all is faster"""
SMALL_PROBLEM = 1 << 15
"""values of all lists together up to which the reference as it is takes less time"""


def sliced_terms(x: Tensor, target: SortedTarget, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """W_p^p of every sample and part, and the gradient of their weighted sum.

    Args:
        x: [N, C, H, W] float32 on the CPU, without a graph. target: batch size B, N a multiple of B; sample i is compared with the
            target's sample i // (N/B).
        with_gradient: whether the gradient is wanted.

    Returns:
        terms [N, parts] float32, and d(sum over parts of weight · term)/dx [N, C, H, W] float32 or None.
    """
    if torch.compiler.is_compiling():
        terms, gradient = simd_sliced_terms(x, *_packed(target), with_gradient)
        return terms, gradient if with_gradient else None
    row, count = _sizes(x, target)
    values = row * count
    gradient = torch.empty(x.shape) if with_gradient else None
    terms = []
    for samples, targets in _groups(len(x), target.batch_size, max(1, CHUNK_VALUES // values)):
        found, piece = (_by_autograd if row <= SMALL_ROW else _group)(x[samples], target[targets], with_gradient)
        terms.append(found)
        if gradient is not None:
            gradient[samples] = piece
    return torch.cat(terms), gradient


def _packed(target: SortedTarget) -> tuple[list[Tensor], list[int], str, list[float]]:
    """A target as what an operator takes: tensors, whole numbers, names, numbers. See `_unpacked`."""
    config = target.config
    empty = target.parts[0].representatives.new_empty(0)
    tensors = [empty if target.projections is None else target.projections]
    for part in target.parts:
        tensors += part[:2]
    whole_numbers = [config.p, config.num_projections, config.patch_size, config.seed, *target.shape]
    names = [config.domain, config.slicing, config.fft_norm, *(part.form for part in target.parts)]
    return tensors, whole_numbers, " ".join(names), [config.amplitude_weight, config.phase_weight]


def _unpacked(tensors: list[Tensor], whole_numbers: list[int], names: list[str], weights: list[float]) -> SortedTarget:
    p, num_projections, patch_size, seed, *shape = whole_numbers
    domain, slicing, fft_norm, *forms = names
    config = SlicingConfig(domain, slicing, p, num_projections, patch_size, seed, *weights, fft_norm)
    parts = tuple(Lists(*tensors[1 + 2 * i : 3 + 2 * i], form) for i, form in enumerate(forms))
    projections = None if slicing == "flat" else tensors[0]
    return SortedTarget(parts, projections, config, tuple(shape))


@torch.library.custom_op("vcd_fast::simd_sliced_terms", mutates_args=())
def simd_sliced_terms(
    x: Tensor,
    tensors: list[Tensor],
    whole_numbers: list[int],
    names: str,
    weights: list[float],
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`sliced_terms` for torch.compile, which takes it as it is; the gradient is empty [0] where it is not wanted."""
    target = _unpacked(tensors, whole_numbers, names.split(), weights)
    terms, gradient = sliced_terms(x, target, with_gradient)
    return terms, x.new_empty(0) if gradient is None else gradient


@simd_sliced_terms.register_fake
def _(x, tensors, whole_numbers, names, weights, with_gradient):
    return x.new_empty((x.shape[0], len(tensors) // 2)), x.new_empty(x.shape if with_gradient else (0,))


def is_small(x: Tensor, target: SortedTarget) -> bool:
    """Whether the reference takes less time: lists so short that they are sorted whole anyway, and no more than fit a chunk, or little of all."""
    row, count = _sizes(x, target)
    values = len(x) * row * count
    return values <= SMALL_PROBLEM or (row <= SMALL_ROW and values <= CHUNK_VALUES)


def _sizes(x: Tensor, target: SortedTarget) -> tuple[int, int]:
    """Values of a full list, and lists of a sample and part."""
    if target.projections is None:
        return x[0].numel(), 1
    return x.shape[-2] * x.shape[-1], len(target.projections)


def _groups(samples: int, targets: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Runs of at most `most` samples, and the targets they belong to: several targets' whole, or some of one target's."""
    frames = samples // targets
    if most >= frames:
        several = most // frames
        for first in range(0, targets, several):
            last = min(first + several, targets)
            yield slice(first * frames, last * frames), slice(first, last)
        return
    for i in range(targets):
        for first in range(i * frames, (i + 1) * frames, most):
            yield slice(first, min(first + most, (i + 1) * frames)), slice(i, i + 1)


def _by_autograd(x: Tensor, target: SortedTarget, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`sliced_terms` for a few samples as the reference computes it: the least overhead where there is little to do."""
    with torch.set_grad_enabled(with_gradient), torch.autograd.graph.saved_tensors_hooks(_detached, _detached):
        x = x.detach().requires_grad_(with_gradient)
        terms = reference.sliced_terms(x, target)
        if not with_gradient:
            return terms, None
        (gradient,) = torch.autograd.grad(terms, x, terms.new_tensor(target.config.part_weights).expand_as(terms))
    return terms.detach(), gradient


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _group(x: Tensor, target: SortedTarget, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`sliced_terms` for a few samples."""
    config = target.config
    owners = np.arange(len(x)) // (len(x) // target.batch_size)
    height, width = x.shape[-2:]
    if config.domain == "feature":
        samples = Samples(x.flatten(2), 0, "whole")
        term, slopes = _part(samples, target, 0, owners, height, width, with_gradient)
        return term.unsqueeze(-1), None if slopes is None else slopes.reshape(x.shape)
    polar = to_polar(x, config.fft_norm, "phase" in config.parts)
    terms, slopes = [], {}
    for i, part in enumerate(config.parts):
        values = polar.amplitude if part == "amplitude" else polar.phase
        samples = spectrum_samples(polar.z, values, part, config, height, width)
        term, found = _part(samples, target, i, owners, height, width, with_gradient)
        terms.append(term)
        if found is not None:
            slopes[part] = _on_kept_bins(found, part, config, height, width)
    terms = torch.stack(terms, -1)
    if not with_gradient:
        return terms, None
    return terms, from_polar(polar, slopes.get("amplitude"), slopes.get("phase"), height, width, config.fft_norm)


def _part(
    samples: Samples,
    target: SortedTarget,
    part: int,
    owners: np.ndarray,
    height: int,
    width: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """One part of a few samples: its term [g], and the derivative of weight · term with respect to `samples.values`."""
    fixed = target.parts[part]
    config, directions = target.config, target.projections
    mixed = samples.form != fixed.form  # one side has bins on the branch cut, the other not: both are compared whole
    if mixed and samples.form != "whole":
        m = samples.values.shape[-1] - samples.singles
        sign = -1 if samples.form == "odd" else 1
        samples = Samples(torch.cat([samples.values, sign * samples.values[..., :m]], -1), 0, "whole")
    count = 1 if directions is None else len(directions)
    values_per_direction = len(owners) * padded(samples.values.shape[-1])
    chunks = -(
        -count * values_per_direction // (CHUNK_VALUES // 8 if mixed else CHUNK_VALUES)
    )  # the former need more of each
    step = -(-count // chunks)
    slopes = padded_rows(*samples.values.shape).zero_() if with_gradient else None
    buffer = torch.empty(step * values_per_direction) if config.slicing == "channel" else None
    total = np.zeros((len(owners), count))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        some = None if directions is None else directions[chunk]
        projected = _project(samples, config, some, height, width, buffer)
        rows, first = fixed, start
        if mixed:
            full = reference.every_value_sorted(Lists(*(values[:, chunk] for values in fixed[:2]), fixed.form))
            rows, first = Lists(full, full[..., :0], "whole"), 0
        total[:, chunk] = compare(projected, rows, owners, first, config.p)
        if slopes is not None:
            _add_projected_back(slopes, projected, samples.singles, config, some, height, width)
    scale = 1 / (fixed.length * count)
    if slopes is not None:
        slopes *= scale * config.part_weights[part]
    return torch.from_numpy(total.sum(-1) * scale).to(torch.float32), slopes


def _project(
    samples: Samples, config: SlicingConfig, projections: Tensor | None, height: int, width: int, buffer: Tensor | None
) -> Tensor:
    """`project`; into `buffer`, rows padded, where that can be: allocating and freeing for every chunk leaves holes in the heap."""
    values = samples.values
    if buffer is None or may_round(values, "matmul"):
        return project(samples, config, projections, height, width).contiguous()
    shape = (len(values), len(projections), padded(values.shape[-1]))
    rows = buffer[: math.prod(shape)].view(shape)
    torch.bmm(projections.expand(len(values), -1, -1), values, out=rows[..., : values.shape[-1]])
    return rows


def _add_projected_back(
    slopes: Tensor,
    projected: Tensor,
    singles: int,
    config: SlicingConfig,
    projections: Tensor | None,
    height: int,
    width: int,
) -> None:
    """Add the adjoint of `project`, applied to derivatives [g, k, n' or more], to `slopes` [g, C, n]."""
    if config.slicing == "channel":
        projected = projected[..., : slopes.shape[-1]]
        if may_round(slopes, "matmul"):
            slopes += exact_matmul(projections.T, projected)
        else:
            torch.baddbmm(slopes, projections.T.expand(len(slopes), -1, -1), projected, out=slopes)
    elif config.slicing == "flat":
        m = slopes.shape[-1] - singles
        pairs, alone = projected[:, 0].split([slopes.shape[1] * m, slopes.shape[1] * singles], -1)
        slopes[..., :m] += pairs.unflatten(-1, (-1, m)) if m else 0
        slopes[..., m:] += alone.unflatten(-1, (-1, singles)) if singles else 0
    else:
        size = config.patch_size
        filters = projections.unflatten(1, (slopes.shape[1], size, size))
        plane = projected.unflatten(-1, (height - size + 1, width - size + 1))
        slopes += exact_conv_transpose2d(plane, filters).flatten(2)


def _on_kept_bins(slopes: Tensor, part: str, config: SlicingConfig, height: int, width: int) -> Tensor:
    """Derivatives with respect to `Samples.values` of a spectrum -> with respect to the values of the kept bins [g, C, m + s]."""
    m, s = half_plane_sizes(height, width)
    if config.slicing == "patch":
        index = mirror_index(height, width)
        slopes = slopes.new_zeros(*slopes.shape[:2], 2 * m + s).index_add_(-1, index, slopes)
    if slopes.shape[-1] == m + s:
        return slopes
    kept = slopes[..., : m + s].clone()
    kept[..., :m].add_(slopes[..., m + s :], alpha=-1 if part == "phase" else 1)
    return kept
