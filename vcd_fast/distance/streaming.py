"""A loss per frame and its pixel gradient, computed together, a few frames at a time.

The loss is linear in its upstream gradient, so the gradient with respect to the pixels can be had while a chunk's activations are hot,
in the forward; all that is kept is one number per pixel. The peak is that of one chunk, however many frames there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Evaluate = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(images [n, 3, H, W], clips they belong to) -> (loss [n] with its graph, terms [n, ...] detached); n/clips consecutive images per clip"""


class FirstDerivativeOnly(torch.autograd.Function):
    """Identity that depends on `marker` in autograd's eyes; asking for its derivative is an error."""

    @staticmethod
    def forward(ctx, gradient: Tensor, marker: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "the Video Consistency Distance has no second derivative: its gradient is computed in the forward, without a graph"
        )


def first_derivative_only(gradient: Tensor) -> Tensor:
    """What a backward returns when autograd records it (`create_graph`): a second derivative must not pass for zero."""
    if not torch.is_grad_enabled():
        return gradient
    return FirstDerivativeOnly.apply(gradient, torch.empty(0, requires_grad=True))


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def chunks(num_clips: int, frames_per_clip: int, chunk_frames: int) -> Iterator[tuple[slice, slice]]:
    """(clips, frames) of every chunk: several whole clips, or a run of frames of one clip, at most `chunk_frames` images each."""
    if chunk_frames >= frames_per_clip:
        whole = max(1, chunk_frames // max(1, frames_per_clip))
        for clip in range(0, num_clips, whole):
            yield slice(clip, min(clip + whole, num_clips)), slice(0, frames_per_clip)
        return
    for clip in range(num_clips):
        for frame in range(0, frames_per_clip, chunk_frames):
            yield slice(clip, clip + 1), slice(frame, min(frame + chunk_frames, frames_per_clip))


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, video: Tensor, evaluate: Evaluate, chunk_frames: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        video = video.detach()
        num_clips, num_frames = video.shape[:2]
        # One tensor for all chunks each, the large one before any of them: what chunks leave behind among their activations would keep
        # the memory of those in pieces.
        gradient = (
            video.new_empty(video.shape, dtype=torch.promote_types(video.dtype, torch.float32))
            if with_gradient
            else None
        )
        losses = terms = None
        for clips, frames in chunks(num_clips, num_frames, chunk_frames):
            images = video[clips, frames].flatten(0, 1)
            # The inner graph lives and dies in this loop. Hooks around the loss (checkpointing, offloading) must not see its tensors:
            # they would be kept, or moved, or make the chunk run again.
            with (
                torch.set_grad_enabled(with_gradient),
                torch.autograd.graph.saved_tensors_hooks(_detached, _detached),
                torch.autocast(video.device.type, enabled=False),
            ):
                images = images.requires_grad_(with_gradient)
                loss, term = evaluate(images, clips)
                if with_gradient:
                    (piece,) = torch.autograd.grad(loss.sum(), images)
            if losses is None:
                losses = loss.new_empty(num_clips, num_frames)
                terms = term.new_empty(num_clips, num_frames, *term.shape[1:])
            shape = losses[clips, frames].shape
            losses[clips, frames] = loss.detach().unflatten(0, shape)
            terms[clips, frames] = term.unflatten(0, shape)
            if with_gradient:
                gradient[clips, frames] = piece.unflatten(0, shape)
            del images, loss, term
        ctx.mark_non_differentiable(terms)
        ctx.dtype = video.dtype
        if with_gradient:
            ctx.save_for_backward(gradient)
        return losses, terms

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            result = (gradient * upstream[:, :, None, None, None]).to(ctx.dtype)
        return first_derivative_only(result), None, None, None


def streamed(video: Tensor, evaluate: Evaluate, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """Evaluate every frame of every clip, in chunks.

    Args:
        video: [B, T, 3, H, W]; the gradient goes here, computed now if it is wanted at all.
        evaluate: see `Evaluate`; each image's loss may depend on that image alone.
        chunk_frames: images evaluated at once.

    Returns:
        loss [B, T], differentiable once, and terms [B, T, ...], detached.
    """
    return _Streamed.apply(video, evaluate, chunk_frames, torch.is_grad_enabled() and video.requires_grad)
