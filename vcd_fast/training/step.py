"""One micro-step of training in three phases: rollout, gradient of the reward with respect to the sample, backward.

The decode graph is gone before the window's graph is walked, so the peak is the larger of the two and not their sum; and whether
reward and gradient are finite is known, on all ranks, before any parameter has a gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vcd_fast.models.base import Condition, I2VModel, Schedule
from vcd_fast.rewards.base import Reward, RewardInput
from vcd_fast.rollout.offload import offloaded
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import run

if TYPE_CHECKING:
    from vcd_fast.rollout.step_cache import StepCache


@dataclasses.dataclass(frozen=True)
class Batch:
    """The clips of one micro-step, and what is random about them."""

    condition: Condition
    image: Tensor
    """[B, 3, H, W] in [0, 1]"""
    prompts: list[str]
    noise: Sequence[torch.Generator]
    """one per clip"""
    frames: Sequence[torch.Generator]
    """one per clip; draws the frames that are judged"""
    window: torch.Generator
    """draws the steps that carry gradients"""
    step: int


@dataclasses.dataclass(frozen=True)
class MicroStep:
    reward: Tensor
    """[B] float32, detached"""
    metrics: dict[str, float]
    finite: bool
    """reward and gradient were finite on every rank; if not, nothing was propagated"""


class PhaseClock:
    """Seconds per phase, summed over the micro-steps of an optimizer step."""

    def __init__(self, device: torch.device):
        self._device = device
        self.seconds: dict[str, float] = {}
        self.current: str | None = None
        """the phase under way; after an error, the one it came from"""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started, self.current = time.perf_counter(), name
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.current = None


def micro_step(
    model: I2VModel,
    forward: Callable[..., object],
    backward: Callable[[Tensor], object],
    schedule: Schedule,
    plan: Plan,
    reward: Reward,
    batch: Batch,
    *,
    scale: float,
    agree: Callable[[bool], bool],
    clock: PhaseClock,
    cache: StepCache | None = None,
) -> MicroStep:
    """Accumulate d(-scale * mean reward)/d(LoRA) of one batch.

    Args:
        forward: the training engine's wrapper of `model.transformer`.
        backward: the training engine's backward; called with scalars, one after another.
        scale: 1 / (micro-steps per optimizer step).
        agree: collective; true if its argument is true on all ranks.
        cache: skips steps of the rollout; how many were computed is then a metric.
    """
    with clock.phase("rollout"):
        state = model.initial(batch.condition, batch.noise)
        rollout = run(
            model, batch.condition, state, schedule, plan, forward=forward, generator=batch.window, cache=cache
        )

    clips = range(batch.image.shape[0])
    judged = [_judge(model, plan, reward, batch, rollout.latents, clip, scale / len(clips), clock) for clip in clips]
    values = torch.cat([clip.reward for clip in judged])
    gradient = torch.cat([clip.gradient for clip in judged])
    metrics = {name: sum(clip.metrics[name] for clip in judged) / len(judged) for name in judged[0].metrics}
    if cache is not None:
        metrics["computed_steps"] = float(sum(rollout.computed))
    finite = agree(bool(torch.isfinite(values).all()) and bool(torch.isfinite(gradient).all()))
    if not finite:
        rollout.close()
        return MicroStep(values, metrics, False)
    with clock.phase("backward"):
        for surrogate in rollout.surrogates(gradient):
            backward(surrogate)
    rollout.close()
    return MicroStep(values, metrics, True)


class _Judged(NamedTuple):
    reward: Tensor
    """[1]"""
    gradient: Tensor
    """of -scale * reward with respect to the clip's latents"""
    metrics: dict[str, float]


def _judge(
    model: I2VModel,
    plan: Plan,
    reward: Reward,
    batch: Batch,
    latents: Tensor,
    clip: int,
    scale: float,
    clock: PhaseClock,
) -> _Judged:
    """One clip at a time: its frames are its own, whatever batch it is in, and decoded videos do not add up in memory."""
    settings = model.settings
    leaf = latents[clip : clip + 1].detach().requires_grad_(True)
    frame_index = reward.frames_wanted(settings.num_frames, batch.frames[clip])
    with clock.phase("decode"), offloaded(model.vae, plan.offload_decode):
        video = model.decode(leaf, frame_index.tolist())
    with clock.phase("reward"):
        pixels = video.detach().requires_grad_(True)
        output = reward(
            RewardInput(
                video=pixels,
                frame_index=frame_index,
                num_frames=settings.num_frames,
                # a model may decode less than was asked for (Open-Sora 272 of 276 rows): cropped, pixels stay where they are
                image=batch.image[clip : clip + 1, :, : video.shape[-2], : video.shape[-1]],
                prompt=[batch.prompts[clip]],
                fps=settings.fps,
                step=batch.step,
                generator=batch.frames[clip],
            )
        )
        (pixel_gradient,) = torch.autograd.grad(-output.reward.sum() * scale, pixels)
    with clock.phase("decode"):
        (gradient,) = torch.autograd.grad(video, leaf, pixel_gradient)
    return _Judged(output.reward.detach(), gradient, output.metrics)
