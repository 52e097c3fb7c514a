"""The sliced Wasserstein distance on the CPU in float32, with its gradient in one go: half spectrum, counted rows, bounded memory.

FFT, amplitude, phase and projections are PyTorch's; rows are compared in NumPy (`counting`) by as many threads as PyTorch may use. A
chunk of directions is projected, compared and projected back before the next; what is kept is the gradient with respect to the bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vcd_fast.distance.backends import reference
from vcd_fast.distance.backends.binning import Key, TargetBins, Workspace
from vcd_fast.distance.backends.counting import compare
from vcd_fast.distance.backends.polar import from_polar, to_polar
from vcd_fast.distance.backends.ranked import Rows
from vcd_fast.distance.bins import mirror_index
from vcd_fast.distance.config import SlicingConfig
from vcd_fast.distance.lists import Lists, Samples, project, spectrum_samples, split
from vcd_fast.distance.precision import exact_conv_transpose2d, exact_matmul, may_round
from vcd_fast.distance.spectrum import half_plane_sizes
from vcd_fast.distance.target import SortedTarget

CHUNK_VALUES = 1 << 22
"""projected values held at a time, 16 MB"""
BLOCK_VALUES = 1 << 17
"""values of the rows a thread compares at a time, about what its cache holds"""
THREADED_VALUES = 1 << 18
"""below that many values a second thread takes longer to start than it saves"""
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


def _packed(target: SortedTarget) -> tuple[list[Tensor], list[int], list[int], str, list[float]]:
    """A target as what an operator takes: tensors, whole numbers, names, numbers. See `_unpacked`."""
    config = target.config
    empty = target.parts[0].representatives.new_empty(0)
    tensors = [empty if target.projections is None else target.projections]
    bits = []
    for part, bins in zip(target.parts, target.bins, strict=True):
        tensors += [*part[:2], *((empty, empty, empty) if bins is None else bins.tensors())]
        bits.append(-1 if bins is None else bins.key.bits)
    whole_numbers = [config.p, config.num_projections, config.patch_size, config.seed, *target.shape]
    names = [config.domain, config.slicing, config.fft_norm, *(part.form for part in target.parts)]
    return tensors, bits, whole_numbers, " ".join(names), [config.amplitude_weight, config.phase_weight]


def _unpacked(
    tensors: list[Tensor], bits: list[int], whole_numbers: list[int], names: list[str], weights: list[float]
) -> SortedTarget:
    p, num_projections, patch_size, seed, *shape = whole_numbers
    domain, slicing, fft_norm, *forms = names
    config = SlicingConfig(domain, slicing, p, num_projections, patch_size, seed, *weights, fft_norm)
    parts, bins = [], []
    for i, form in enumerate(forms):
        representatives, alone, *counted = tensors[1 + 5 * i : 6 + 5 * i]
        parts.append(Lists(representatives, alone, form))
        bins.append(None if bits[i] < 0 else TargetBins(Key(form, bits[i]), *counted))
    projections = None if slicing == "flat" else tensors[0]
    return SortedTarget(tuple(parts), projections, config, tuple(shape), tuple(bins))


@torch.library.custom_op("vcd_fast::simd_sliced_terms", mutates_args=())
def simd_sliced_terms(
    x: Tensor,
    tensors: list[Tensor],
    bits: list[int],
    whole_numbers: list[int],
    names: str,
    weights: list[float],
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`sliced_terms` for torch.compile, which takes it as it is; the gradient is empty [0] where it is not wanted."""
    target = _unpacked(tensors, bits, whole_numbers, names.split(), weights)
    terms, gradient = sliced_terms(x, target, with_gradient)
    return terms, x.new_empty(0) if gradient is None else gradient


@simd_sliced_terms.register_fake
def _(x, tensors, bits, whole_numbers, names, weights, with_gradient):
    return x.new_empty((x.shape[0], len(bits))), x.new_empty(x.shape if with_gradient else (0,))


def is_small(x: Tensor, target: SortedTarget) -> bool:
    """Whether the distance of x to `target` takes less time than getting here does."""
    row, count = _sizes(x, target)
    return len(x) * row * count <= SMALL_PROBLEM


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
    fixed, bins = target.parts[part], target.bins[part]
    config, directions = target.config, target.projections
    if samples.form != fixed.form:  # one side has bins on the branch cut, the other not
        if samples.form != "whole":
            m = samples.values.shape[-1] - samples.singles
            sign = -1 if samples.form == "odd" else 1
            samples = Samples(torch.cat([samples.values, sign * samples.values[..., :m]], -1), 0, "whole")
        full = reference.every_value_sorted(fixed)
        fixed = Lists(full, full[..., :0], "whole")
        bins = None if config.p == 2 else TargetBins.of(full, "whole")
    count = 1 if directions is None else len(directions)
    step = max(1, CHUNK_VALUES // max(1, len(owners) * fixed.length))
    slopes = torch.zeros_like(samples.values) if with_gradient else None
    buffer = (
        torch.empty(len(owners) * min(step, count) * samples.values.shape[-1]) if config.slicing == "channel" else None
    )
    total = np.zeros((len(owners), count))
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        some = None if directions is None else directions[chunk]
        projected = _project(samples, config, some, height, width, buffer)
        total[:, chunk] = _compare(split(projected, samples, config), fixed, bins, owners, chunk, config.p)
        if slopes is not None:
            _add_projected_back(slopes, projected, samples.singles, config, some, height, width)
    scale = 1 / (fixed.length * count)
    if slopes is not None:
        slopes *= scale * config.part_weights[part]
    return torch.from_numpy(total.sum(-1) * scale).to(torch.float32), slopes


def _project(
    samples: Samples, config: SlicingConfig, projections: Tensor | None, height: int, width: int, buffer: Tensor | None
) -> Tensor:
    """`project`, into `buffer` where that can be: allocating and freeing for every chunk leaves holes in the heap."""
    if buffer is None or may_round(samples.values, "matmul"):
        return project(samples, config, projections, height, width).contiguous()
    shape = (len(samples.values), len(projections), samples.values.shape[-1])
    out = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
    return torch.bmm(projections.expand(len(samples.values), -1, -1), samples.values, out=out)


def _add_projected_back(
    slopes: Tensor,
    projected: Tensor,
    singles: int,
    config: SlicingConfig,
    projections: Tensor | None,
    height: int,
    width: int,
) -> None:
    """Add the adjoint of `project`, applied to derivatives [g, k, n'], to `slopes` [g, C, n]."""
    if config.slicing == "channel" and may_round(slopes, "matmul"):
        slopes += exact_matmul(projections.T, projected)
    elif config.slicing == "channel":
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


def _compare(
    lists: Lists, fixed: Lists, bins: TargetBins | None, owners: np.ndarray, chunk: slice, p: int
) -> np.ndarray:
    """Compare the rows of a chunk with the target's; sums [g, k] float64, derivatives in place of `lists`."""
    values, singles = (part.numpy() for part in lists[:2])
    target, target_singles = (part.numpy() for part in fixed[:2])
    places = _places(fixed, chunk)
    of_target = [] if bins is None else [tensor.numpy() for tensor in bins.tensors()]
    group, count, m = values.shape
    total = np.empty((group, count))
    step = max(1, BLOCK_VALUES // max(1, m))

    def run(block: tuple[slice, slice], workspace: Workspace) -> None:
        some, rows = block
        fixed_rows = slice(chunk.start + rows.start, chunk.start + rows.stop)
        pick = owners[some.start] if some.stop - some.start == 1 else owners[some]  # the former makes no copy
        sides = [values[some, rows], singles[some, rows]]
        sides += [target[pick, fixed_rows], target_singles[pick, fixed_rows], places[pick, rows]]
        counted = [array[pick, fixed_rows] for array in of_target]
        sums = total[some, rows]
        sides, counted = ([_as_rows(a, sums.size) for a in arrays] for arrays in (sides, counted))
        block_rows = Rows(*sides, fixed.form, p, bins and bins.key, *counted)
        with np.errstate(invalid="ignore", over="ignore"):  # infinities end in a sum that is none, which says it
            sums[...] = compare(block_rows, workspace).reshape(sums.shape)

    if step >= count:  # whole samples: all of their directions are adjacent
        several = max(1, step // count)
        blocks = [(slice(i, min(i + several, group)), slice(0, count)) for i in range(0, group, several)]
    else:
        blocks = [
            (slice(i, i + 1), slice(k, min(k + step, count))) for i in range(group) for k in range(0, count, step)
        ]
    _run(run, blocks, values.size)
    return total


def _as_rows(array: np.ndarray, count: int) -> np.ndarray:
    """[.., k] -> [count, k], a view: rows of different samples are equally far apart."""
    if array.ndim == 3 and array.shape[0] == 1:
        return array[0]
    if array.ndim == 3 and array.size:
        shape, strides = (count, array.shape[-1]), array.strides[1:]
        return np.lib.stride_tricks.as_strided(array, shape, strides)
    return array.reshape(count, array.shape[-1])


def _places(fixed: Lists, chunk: slice) -> np.ndarray:
    """Positions [B, k, S] of the target's single values in its full lists."""
    values, alone = fixed.representatives[:, chunk].contiguous(), fixed.self_conjugate[:, chunk].contiguous()
    at_most = torch.searchsorted(values, alone, right=True)
    if fixed.form == "odd":  # NaN stands behind everything
        larger = torch.searchsorted(values, -alone).masked_fill_(alone.isnan(), 0)
        pairs = values.shape[-1] + at_most - larger
    else:
        pairs = at_most if fixed.form == "whole" else 2 * at_most
    return (pairs + torch.arange(alone.shape[-1])).numpy()


def _run(work: Callable[[tuple[slice, slice], Workspace], None], blocks: list[tuple[slice, slice]], size: int) -> None:
    """`work` on all blocks, in as many threads as PyTorch may use. NumPy and PyTorch let go of the interpreter while they compute."""
    threads = min(torch.get_num_threads(), len(blocks)) if size >= THREADED_VALUES else 1

    def share(first: int) -> None:
        workspace = Workspace()
        for block in blocks[first::threads]:
            work(block, workspace)

    if threads < 2:
        share(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(share, range(threads)):
            pass


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
