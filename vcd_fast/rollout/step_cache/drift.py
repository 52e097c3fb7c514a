"""How far a cached rollout ends from the full one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vcd_fast.models.base import Condition, I2VModel
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import Forward, rollout
from vcd_fast.rollout.step_cache.hooks import StepCache


@dataclasses.dataclass(frozen=True)
class Drift:
    latents: float
    """norm of the difference of the final latents relative to the norm of the full rollout's"""
    computed: int
    steps: int


@torch.no_grad()
def measure_drift(
    model: I2VModel,
    condition: Condition,
    seeds: Sequence[int],
    sampling_steps: int,
    cache: StepCache,
    *,
    forward: Forward | None = None,
    compute_at: Sequence[int] = (),
) -> Drift:
    """Sample the same clips with and without the cache; nothing is decoded.

    Args:
        condition: batch of B.
        seeds: of the noise, one per clip.
        compute_at: steps that training computes whatever the rule says.
    """
    settings = model.settings
    schedule = model.schedule(sampling_steps, settings.height, settings.width, settings.num_frames)

    def start():
        return model.initial(condition, [torch.Generator().manual_seed(seed) for seed in seeds])

    with cache.paused():
        full = rollout(model, condition, start(), schedule, Plan(), forward=forward)
    cache.begin([step.timestep for step in schedule], compute_at)
    cached = rollout(model, condition, start(), schedule, Plan(), forward=forward)
    computed = sum(cache.decisions)
    cache.end()
    return Drift(relative_difference(cached, full), computed, len(schedule))


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference|, Euclidean norms."""
    return float((found - reference).norm() / reference.norm())
