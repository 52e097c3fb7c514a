"""Open-Sora 1.2's rectified flow: its times, and the rule by which a clip keeps the frames it is conditioned on.

At time t, in 0..1000, a latent is x_t = (1 - t/1000) x + (t/1000) noise, and the network gives v = x - noise: the opposite sign of
diffusers' flow matching. Steps go from 1000 down to 0 and add v dt with dt > 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vcd_fast.models.base import Schedule, State, Step

TRAIN_TIMESTEPS = 1000
BASE_PIXELS = 512 * 512
FRAMES_PER_CHUNK, LATENTS_PER_CHUNK = 17, 5


def flow_schedule(sampling_steps: int, height: int, width: int, num_frames: int) -> Schedule:
    """`sampling_steps` Euler steps from t = 1000 to 0, the denser at large t the larger the clip (SD3, arXiv 2403.03206, section 5.3.2).

    Computed in float32 as the original does: the timesteps are equal bit for bit, except that the first is never above 1000. In
    the original rounding lets it be 1000.0001 for some clips below 256x256 pixels; no frame is then generated in the first step, and all are noised
    anew in the second.

    Args:
        height, width: size of the video in pixels, as asked for.

    Raises:
        ValueError: fewer than one step, or a clip of 2 to 16 frames, for which the original's rule has no times.
    """
    if sampling_steps < 1:
        raise ValueError(f"sampling_steps: expected at least 1, got {sampling_steps}")
    base = torch.tensor([(1.0 - i / sampling_steps) * TRAIN_TIMESTEPS for i in range(sampling_steps)])
    times = shifted(base, shift_ratio(height, width, num_frames)).clamp(max=TRAIN_TIMESTEPS)
    ends = torch.cat((times[1:], torch.zeros(1)))
    lengths = (times - ends) / TRAIN_TIMESTEPS
    columns = (times.tolist(), (times / TRAIN_TIMESTEPS).tolist(), lengths.tolist())
    return Schedule(tuple(Step(i, *values) for i, values in enumerate(zip(*columns, strict=True))))


def shift_ratio(height: int, width: int, num_frames: int) -> Tensor:
    """sqrt(latent frames) times the clip's side relative to 512 pixels, a float32 scalar.

    Raises:
        ValueError: 2 to 16 frames.
    """
    if num_frames != 1 and num_frames < FRAMES_PER_CHUNK:
        raise ValueError(f"num_frames: expected 1 or at least {FRAMES_PER_CHUNK}, got {num_frames}")
    frames = 1 if num_frames == 1 else num_frames // FRAMES_PER_CHUNK * LATENTS_PER_CHUNK
    space = (torch.tensor(float(height)) * torch.tensor(float(width)) / BASE_PIXELS).sqrt()
    return space * torch.tensor(float(frames)).sqrt()


def shifted(times: Tensor, ratio: Tensor | float) -> Tensor:
    """s' = ratio s / (1 + (ratio - 1) s) with s = t / 1000, times 1000."""
    s = times / TRAIN_TIMESTEPS
    return ratio * s / (1 + (ratio - 1) * s) * TRAIN_TIMESTEPS


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """x_t = (1 - sigma) x + sigma noise, sigma = t / 1000."""
    return (1 - sigma) * latents + sigma * noise


@dataclasses.dataclass(frozen=True)
class OpenSoraState(State):
    """Where a rollout stands, with what each latent frame is conditioned on.

    A frame of edit ratio e keeps its latents while t > 1000 e. When t falls to 1000 e it is noised to that t, once, and generated from
    there on. So e = 1 is a generated frame and e = 0 one that stays as it is, bit for bit.
    """

    edit: Tensor
    """[B, f] float32 in [0, 1]"""
    generated: Tensor
    """[B, f] bool: frames that need no noising any more"""
    noise: Tensor | None = None
    """like `latents`: what frames of 0 < e < 1 are noised with; None if there are none"""


def active_frames(state: OpenSoraState, step: Step) -> Tensor:
    """[B, f] bool: the frames that this step generates."""
    return state.edit * TRAIN_TIMESTEPS >= step.timestep


def network_input(state: OpenSoraState, step: Step) -> Tensor:
    """The latents of `state`, frames that become active in this step noised to its time."""
    if state.noise is None:
        return state.latents
    fresh = active_frames(state, step) & ~state.generated
    return torch.where(_over_pixels(fresh), add_noise(state.latents, state.noise, step.sigma), state.latents)


def advanced(state: OpenSoraState, velocity: Tensor, step: Step) -> OpenSoraState:
    """The Euler update of active frames; all others are restored to what they were before this step."""
    active = active_frames(state, step)
    moved = network_input(state, step) + velocity * step.dt
    latents = torch.where(_over_pixels(active), moved, state.latents)
    return dataclasses.replace(state, latents=latents, generated=active)


def _over_pixels(frames: Tensor) -> Tensor:
    return frames[:, None, :, None, None]
