"""The sliced Wasserstein distance on a GPU in float32, with its gradient in one go, by the kernels of `vcd_fast.kernels`.

rfft2 → projected amplitudes and phases → rows compared with the sorted target → gradient of the half spectrum → irfft2. What exists
at a time is one chunk of directions of a few samples; what is kept is the gradient with respect to x. Nothing waits for the device.

The whole of it is one operator, `vcd_fast::triton_sliced_terms`, so that torch.compile takes it as it is. Triton is imported when it first
runs. On a CPU it runs only in Triton's interpreter, to be tested: VCD_FAST_INTERPRET=1 (or TRITON_INTERPRET=1) before triton is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vcd_fast.distance.spectrum import HalfPlane, half_plane, half_plane_sizes, inverse_half_gradient
from vcd_fast.distance.target import SortedTarget

INTERPRET_VARIABLE = "VCD_FAST_INTERPRET"
PRECISION_VARIABLE = "VCD_FAST_TRITON_PRECISION"
METHOD_VARIABLE = "VCD_FAST_TRITON_METHOD"
CHUNK_VALUES = 1 << 22
"""projected values of one part held at a time; with the scratch of a long row's comparison, up to about 40 bytes each"""
MOST_SAMPLES = 1 << 15
"""samples compared at a time; the third dimension of a grid ends at 65535"""
OLDEST_TRITON = (3, 4)
FORMS = ("whole", "even", "odd")
"""in the numbering of `kernels.half_list`"""


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of `device`, or None when they can."""
    if device.type == "cpu" and os.environ.get(INTERPRET_VARIABLE, "0") not in ("", "0"):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        import triton
    except ImportError as error:
        return (
            f"triton cannot be imported ({error}); on Linux: pip install triton, on Windows: pip install triton-windows"
        )
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    from vcd_fast.kernels.launch import interpreted

    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "the tensors are on the CPU, where the kernels only run in Triton's interpreter, for tests: set "
            f"{INTERPRET_VARIABLE}=1 before anything imports triton"
        )
    if device.type != "cuda":
        return f"the tensors are on {device}, and the kernels are for CUDA and ROCm"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, which replaces every kernel by an interpreter for CPU tensors"
    return None


def unsupported(target: SortedTarget) -> str | None:
    """Why the kernels do not compute the distance that `target` asks for, or None when they do."""
    config = target.config
    if config.domain != "frequency" or config.slicing != "channel":
        return f"the kernels compute the channel reading of spectra, not domain={config.domain!r} with slicing={config.slicing!r}"
    if target.dtype != torch.float32:
        return f"the kernels compute in torch.float32, and the target is {target.dtype}"
    return None


def sliced_terms(
    x: Tensor,
    target: SortedTarget,
    with_gradient: bool,
    *,
    method: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """W_p^p of every sample and part, and the gradient of their weighted sum.

    Args:
        x: [N, C, H, W] float32, without a graph, any strides. target: batch size B, N a multiple of B; sample i is compared with the
            target's sample i // (N/B).
        with_gradient: whether the gradient is wanted.
        method: how rows are compared: "auto", "project", "rows", "merge", "count" or "sort", see `kernels.config`; by default what the
            environment variable VCD_FAST_TRITON_METHOD says, else "auto".
        precision: of the projections: "ieee", "tf32x3" or "tf32"; by default VCD_FAST_TRITON_PRECISION, else "ieee", which is exact.

    Returns:
        terms [N, parts] float32, and d(sum over parts of weight · term)/dx [N, C, H, W] float32 or None. Deterministic.

    Raises:
        ValueError: the kernels cannot run here, or do not compute what the target asks for; the message says why.
    """
    reason = unavailable(x.device) or unsupported(target)
    if reason:
        raise ValueError(f"backend 'triton' cannot run: {reason}; use backend='auto' or 'reference'")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be torch.float32, got {x.dtype}")
    config = target.config
    lists = [tensor for part in target.parts for tensor in part[:2]]
    terms, gradient = triton_sliced_terms(
        x,
        target.projections,
        lists,
        [FORMS.index(part.form) for part in target.parts],
        [int(name == "phase") for name in config.parts],
        list(config.part_weights),
        config.p,
        config.fft_norm,
        with_gradient,
        method or os.environ.get(METHOD_VARIABLE) or "auto",
        precision or os.environ.get(PRECISION_VARIABLE) or "ieee",
    )
    return terms, gradient if with_gradient else None


@torch.library.custom_op("vcd_fast::triton_sliced_terms", mutates_args=())
def triton_sliced_terms(
    x: Tensor,
    directions: Tensor,
    lists: list[Tensor],
    forms: list[int],
    phases: list[int],
    weights: list[float],
    power: int,
    fft_norm: str,
    with_gradient: bool,
    method: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """`sliced_terms` on plain arguments; the gradient is empty [0] where it is not wanted.

    lists: sorted representatives [B, K, m] and single values [B, K, S] of every part, alternating; forms: places in `FORMS`; phases:
    1 for a phase, 0 for an amplitude.
    """
    samples, height, width = x.shape[0], x.shape[-2], x.shape[-1]
    fixed = [
        _fixed_part(*sides, form, bool(phase), weight)
        for *sides, form, phase, weight in zip(lists[::2], lists[1::2], forms, phases, weights, strict=True)
    ]
    work = _Work(half_plane(height, width, x.device), directions.contiguous(), power, fft_norm, method, precision)
    terms = torch.empty(samples, len(fixed), dtype=torch.float32, device=x.device)
    gradient = torch.empty(x.shape if with_gradient else (0,), dtype=torch.float32, device=x.device)
    for some, owners in _groups(samples, lists[0].shape[0], len(directions) * height * width // 2):
        parts = [part.of(owners) for part in fixed]
        terms[some], piece = _group(x[some], parts, work, with_gradient)
        if piece is not None:
            gradient[some] = piece
    return terms, gradient


@triton_sliced_terms.register_fake
def _(x, directions, lists, forms, phases, weights, power, fft_norm, with_gradient, method, precision):
    terms = x.new_empty((x.shape[0], len(forms)), dtype=torch.float32)
    return terms, x.new_empty(x.shape if with_gradient else (0,), dtype=torch.float32)


class _Work(NamedTuple):
    """What is the same for every group of samples."""

    plane: HalfPlane
    directions: Tensor
    power: int
    fft_norm: str
    method: str
    precision: str


class _FixedPart(NamedTuple):
    """One part of the target: its lists, the positions of its single values in the full lists, and what it counts for."""

    representatives: Tensor
    own: Tensor
    place: Tensor
    form: int
    phase: bool
    weight: float

    def of(self, owners: slice) -> _FixedPart:
        return self._replace(**{name: getattr(self, name)[owners] for name in ("representatives", "own", "place")})


def _fixed_part(representatives: Tensor, own: Tensor, form: int, phase: bool, weight: float) -> _FixedPart:
    from vcd_fast.kernels.half_list import single_places

    representatives, own = representatives.contiguous(), own.contiguous()
    return _FixedPart(representatives, own, single_places(representatives, own, form), form, phase, weight)


def _groups(samples: int, targets: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Samples that are compared at once, and the targets they belong to; `size` values a sample."""
    frames, most = samples // targets, min(MOST_SAMPLES, max(1, CHUNK_VALUES // max(1, size)))
    if most >= frames:
        several = most // frames
        for first in range(0, targets, several):
            last = min(first + several, targets)
            yield slice(first * frames, last * frames), slice(first, last)
    else:
        for i in range(targets):
            for first in range(0, frames, most):
                last = min(first + most, frames)
                yield slice(i * frames + first, i * frames + last), slice(i, i + 1)


class _Tables(NamedTuple):
    """int32 tables of a half plane for the kernels."""

    kept: Tensor
    """[m + S]"""
    every: Tensor
    """[2m + S]: `kept`, then the representatives once more, for their mirror images"""
    mirror: Tensor
    """[m + S]: where the conjugate of a kept bin stands, -1 where it does not"""


@functools.lru_cache(maxsize=256)
def _tables(plane: HalfPlane) -> _Tables:
    with torch.inference_mode(False):
        kept = torch.cat([plane.representatives, plane.self_conjugate]).to(torch.int32)
        mirror = torch.full_like(kept, -1)
        mirror[plane.mirrored] = plane.mirrors.to(torch.int32)
        return _Tables(kept, torch.cat([kept, plane.representatives.to(torch.int32)]), mirror)


def _group(x: Tensor, parts: list[_FixedPart], work: _Work, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Terms [g, parts] and gradient [g, C, H, W] of a few samples."""
    from vcd_fast.kernels.spectrum_gradient import spectrum_bwd

    plane, tables = work.plane, _tables(work.plane)
    half = torch.fft.rfft2(x, norm=work.fft_norm).flatten(-2).contiguous()
    z = half.view(torch.int64)
    parts = [_in_form_of(half, part, plane) for part in parts]
    m, _ = half_plane_sizes(plane.height, plane.width)
    count = len(work.directions)
    chunks = -(-count * plane.bins * len(x) // 2 // CHUNK_VALUES)
    step = -(-count // max(1, chunks))
    gradient = torch.empty_like(z) if with_gradient else None
    sums = torch.zeros(len(x), len(parts), dtype=torch.float64, device=x.device)
    for first in range(0, count, step):
        some = work.directions[first : first + step]
        compared = _compare(z, parts, work, some, first)
        signs: list[Tensor | None] = [None, None]
        scales = [0.0, 0.0]
        for i, (part, (cost, sign)) in enumerate(zip(parts, compared, strict=True)):
            sums[:, i] += cost.sum(-1, dtype=torch.float64)
            signs[part.phase] = sign
            scales[part.phase] = part.weight / (plane.bins * count)
        if gradient is not None:
            spectrum_bwd(
                z, tables.kept, tables.mirror, some, *signs, m, *scales, gradient, accumulate=first > 0, precision=work.precision
            )  # fmt: skip
    terms = (sums / (plane.bins * count)).to(torch.float32)
    if gradient is None:
        return terms, None
    half = gradient.view(torch.complex64).unflatten(-1, (plane.height, plane.half_width))
    return terms, inverse_half_gradient(half, plane.height, plane.width, work.fft_norm)


def _compare(z: Tensor, parts: list[_FixedPart], work: _Work, some: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """Cost [g, k] and derivatives [g, k, at least m + S] of every part, for a chunk of directions."""
    from vcd_fast.kernels.config import resolve_method
    from vcd_fast.kernels.launch import architecture
    from vcd_fast.kernels.project import project_fwd
    from vcd_fast.kernels.rows import project_rows_fwd

    tables = _tables(work.plane)
    m, singles = half_plane_sizes(work.plane.height, work.plane.width)
    methods = [
        resolve_method(work.method, part.representatives.shape[-1], work.power, architecture(z.device))
        for part in parts
    ]
    folded = {i for i, part in enumerate(parts) if FORMS[part.form] == "whole"}
    fused = {i for i, method in enumerate(methods) if method == "project"} - folded
    together = [part.phase for i, part in enumerate(parts) if i not in folded | fused]
    values = project_fwd(
        z, tables.kept, some, m, singles, False in together, True in together, work.precision
    ) if together else None  # fmt: skip
    compared = []
    for i, (part, method) in enumerate(zip(parts, methods, strict=True)):
        fixed = (part.representatives, part.own, part.place, part.form, work.power)
        if i in fused:
            compared.append(project_rows_fwd(z, tables.kept, some, *fixed, work.precision, first))
        elif i in folded:
            projected = project_fwd(z, tables.every, some, m, singles, not part.phase, part.phase, work.precision)
            cost, sign = _rows(projected[part.phase], fixed, "rows" if method == "project" else method, first)
            kept = m + singles
            sign[..., :m] += (-1 if part.phase else 1) * sign[..., kept : kept + m]  # derivative of the mirror image
            compared.append((cost, sign))
        else:
            compared.append(_rows(values[part.phase], fixed, method, first))
    return compared


def _rows(values: Tensor, fixed: tuple, method: str, first: int) -> tuple[Tensor, Tensor]:
    from vcd_fast.kernels.count import count_fwd
    from vcd_fast.kernels.library_sort import sort_fwd
    from vcd_fast.kernels.merge import merge_fwd
    from vcd_fast.kernels.rows import rows_fwd

    compare = {"rows": rows_fwd, "merge": merge_fwd, "count": count_fwd, "sort": sort_fwd}[method]
    return compare(values, *fixed, first)


def _in_form_of(half: Tensor, part: _FixedPart, plane: HalfPlane) -> _FixedPart:
    """The part of the target in a form that holds for the samples too.

    Phases are odd except on the branch cut (see `target.phase_is_odd`). On a GPU the form follows from the size alone, so both sides
    have the same; in the interpreter the spectra are looked at, and one of them may have bins there.
    """
    if not part.phase or FORMS[part.form] == "whole" or half.device.type != "cpu":
        return part
    z = half[..., plane.representatives]
    on_cut = (z.imag == 0) & (z.real < -(torch.finfo(torch.float32).tiny ** 0.5))
    if not bool(on_cut.any()):
        return part
    w, own, _ = part[:3]
    every = torch.cat([w, -w, own], -1).sort(-1).values
    return _fixed_part(every, own[..., :0].contiguous(), FORMS.index("whole"), True, part.weight)
