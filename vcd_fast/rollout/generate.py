"""Videos without gradients: what samples, evaluation and `vcd generate` show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcd_fast.models.base import Condition, I2VModel
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import Forward, rollout

if TYPE_CHECKING:
    from vcd_fast.rollout.step_cache.hooks import StepCache


@torch.no_grad()
def generate(
    model: I2VModel,
    condition: Condition,
    generators: torch.Generator | Sequence[torch.Generator],
    sampling_steps: int,
    *,
    frames: Sequence[int] | None = None,
    forward: Forward | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    cache: StepCache | None = None,
) -> Tensor:
    """Sample and decode a batch of clips of the size in `model.settings`.

    Args:
        condition: batch of B conditions on the model's device.
        generators: one for the batch, or one per sample, which makes a sample independent of its batch.
        frames: 0-based positions to decode, ascending; None: all.
        on_progress: called with ("sample", steps done, steps) and ("decode", clips done, clips).
        cache: of `model.transformer`, to sample with.

    Returns:
        video [B, T, 3, H, W] float32 in [0, 1], on the CPU. Clips are decoded one at a time.

    Raises:
        ValueError: not as many generators as samples.
    """
    report = on_progress or (lambda phase, done, total: None)
    settings = model.settings
    schedule = model.schedule(sampling_steps, settings.height, settings.width, settings.num_frames)
    latents = rollout(
        model,
        condition,
        model.initial(condition, generators),
        schedule,
        Plan(),
        forward=forward,
        on_step=lambda done, total: report("sample", done, total),
        cache=cache,
    )
    clips = []
    for index in range(len(latents)):
        clips.append(model.decode(latents[index : index + 1], frames, checkpoint=False).float().cpu())
        report("decode", index + 1, len(latents))
    return torch.cat(clips)
