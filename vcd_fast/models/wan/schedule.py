"""The noise levels of Wan 2.1's own sampler as plain numbers."""

from __future__ import annotations

import numpy as np

from vcd_fast.models.base import Schedule, Step

TRAIN_TIMESTEPS = 1000


def flow_schedule(sampling_steps: int, shift: float) -> Schedule:
    """`sampling_steps` Euler steps over sigma_i = shift s_i / (1 + (shift - 1) s_i), s_i = 1 - i/N, to sigma_N = 0.

    This is the schedule of Wan's own code. The one that diffusers' `FlowMatchEulerDiscreteScheduler` chooses by default spaces N levels
    down to the smallest of training and then adds 0, so that its last step is 0.0089 long (30 steps, shift 3): a gradient through it is all but nothing.
    All numbers are rounded to float32 as that scheduler rounds them: given these sigmas it takes the same steps, bit for bit.

    Raises:
        ValueError: fewer than one step.
    """
    if sampling_steps < 1:
        raise ValueError(f"sampling_steps: expected at least 1, got {sampling_steps}")
    s = np.linspace(1.0, 0.0, sampling_steps + 1)[:-1].astype(np.float32)
    sigmas = shift * s / (1 + (shift - 1) * s)
    timesteps = sigmas * np.float32(TRAIN_TIMESTEPS)
    ends = np.append(sigmas[1:], np.float32(0.0))
    lengths = ends - sigmas
    return Schedule(
        tuple(
            Step(index, float(timestep), float(sigma), float(dt))
            for index, (timestep, sigma, dt) in enumerate(zip(timesteps, sigmas, lengths, strict=True))
        )
    )
