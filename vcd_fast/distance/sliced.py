"""The sliced Wasserstein distance between feature maps, or between their amplitude and phase spectra."""

from __future__ import annotations

import torch
from torch import Tensor

from vcd_fast.distance.backends import TermsAndGradient, fused_backend, reference
from vcd_fast.distance.streaming import first_derivative_only
from vcd_fast.distance.target import SortedTarget, check_features, sort_target


class _Fused(torch.autograd.Function):
    """A backend that computes the gradient in the forward; nothing else is kept."""

    @staticmethod
    def forward(
        ctx, x: Tensor, target: SortedTarget, compute: TermsAndGradient, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        terms, gradient = compute(x.detach().to(target.dtype), target, with_gradient)
        ctx.mark_non_differentiable(terms)
        ctx.dtype = x.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return weighted(terms, target), terms

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        result = (gradient * upstream[:, None, None, None]).to(ctx.dtype)
        return first_derivative_only(result), None, None, None


def weighted(terms: Tensor, target: SortedTarget) -> Tensor:
    """[N, parts] -> [N], with the amplitude and phase weights."""
    return sum(weight * terms[:, i] for i, weight in enumerate(target.config.part_weights))


def sliced_terms(x: Tensor, target: SortedTarget, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The distance of every sample and its terms.

    Returns:
        total [N], differentiable with respect to x, and terms [N, parts], detached and unweighted.
    """
    compute = fused_backend(backend, x, target)
    with torch.autocast(x.device.type, enabled=False):
        if compute is not None:
            return _Fused.apply(x, target, compute, torch.is_grad_enabled() and x.requires_grad)
        terms = reference.sliced_terms(x.to(target.dtype), target)
        return weighted(terms, target), terms.detach()


def sliced_wasserstein(
    x: Tensor,
    y: Tensor | SortedTarget,
    projections: Tensor | None = None,
    *,
    backend: str = "auto",
    **options: object,
) -> Tensor:
    """Sliced Wasserstein distance W_p^p of x to y, amplitude and phase of the two-dimensional FFT apart (VCD, Eq. 2, one layer).

        amplitude_weight · W(|FFT2 x|, |FFT2 y|) + phase_weight · W(angle FFT2 x, angle FFT2 y)

    where W is the mean over K directions and n ranks of |x_(j) - y_(j)|^p, the values projected and sorted, in float32 also where
    `torch.set_float32_matmul_precision` allows PyTorch less. All backends but the reference compute the gradient in the forward and keep nothing else; it can be taken once. torch.compile takes the call whole
    (fullgraph) if y was prepared by `sort_target`.

    Args:
        x: [B, C, H, W] floating point; the gradient goes here.
        y: [B, C, H, W] or [1, C, H, W], the fixed side; or what `sort_target` made of it, and then neither `projections` nor
            `options` may be given.
        projections: directions in place of drawn ones, see `sort_target`.
        backend: "auto", "reference", "simd" or "triton".
        options: `slicing`, `p`, `num_projections`, `patch_size`, `seed`, `domain`, `amplitude_weight`, `phase_weight`, `fft_norm`, see
            `SlicingConfig`; `layer` names the feature map for the drawing of directions.

    Returns:
        [B] float32 (float64 if x and y are).

    Raises:
        TypeError, ValueError: wrong type, shape or option, y needs a gradient, the backend cannot run.
    """
    check_features(x, "x")
    if isinstance(y, SortedTarget):
        if options or projections is not None:
            raise TypeError("y is a SortedTarget, which carries directions and options: expected no others")
        target = y
    else:
        check_features(y, "y")
        if y.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "y: expected a tensor that needs no gradient, it is the fixed side; swap x and y or detach it"
            )
        if x.device != y.device:
            raise ValueError(f"y: expected to be on the device of x, {x.device}, got {y.device}")
        dtype = torch.promote_types(x.dtype, y.dtype)
        target = sort_target(y.to(dtype), projections, **options)
    if x.device != target.device:
        raise ValueError(f"y: expected to be on the device of x, {x.device}, got {target.device}")
    if tuple(x.shape[1:]) != target.shape:
        raise ValueError(
            f"x: expected the target's channels, height and width {list(target.shape)}, got {list(x.shape[1:])}"
        )
    if target.batch_size not in (1, x.shape[0]):
        raise ValueError(f"y: expected batch size 1 or that of x, {x.shape[0]}, got {target.batch_size}")
    return sliced_terms(x, target, backend)[0]
