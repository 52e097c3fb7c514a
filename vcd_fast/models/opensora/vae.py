"""Open-Sora 1.2's VAE: a VAE of single frames (diffusers' `AutoencoderKL`) with a VAE over time on top.

Time is cut into chunks of 17 frames, 5 latent frames each, that know nothing of one another; the published weights were trained with
exactly that. So a set of frames costs the temporal decode of the chunks they stand in and the spatial decode of the frames themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vcd_fast.models.opensora.temporal_vae import TemporalVAE, sampled

CHUNK_FRAMES = 17
CHUNK_LATENTS = 5
TIME_FACTOR = 4
SPATIAL_FACTOR = 8
SPATIAL_SCALE = 0.18215
"""Not the 0.13025 of the SDXL VAE that the spatial part starts from: Open-Sora was trained with this one (Open-Sora#493)."""
FRAMES_PER_ENCODE = 4


class Chunk(NamedTuple):
    """Frames of a clip that are decoded together, and where they come from."""

    first_frame: int
    frames: int
    first_latent: int
    latents: int


def latent_frames(num_frames: int) -> int:
    """Latent frames of a clip: 5 per 17 frames, and one per started 4 of the rest."""
    whole, rest = divmod(num_frames, CHUNK_FRAMES)
    return CHUNK_LATENTS * whole + math.ceil(rest / TIME_FACTOR)


def chunks(num_frames: int) -> list[Chunk]:
    """The chunks of a clip, in order."""
    found = []
    for first in range(0, num_frames, CHUNK_FRAMES):
        frames = min(CHUNK_FRAMES, num_frames - first)
        found.append(Chunk(first, frames, latent_frames(first), latent_frames(frames)))
    return found


class _Spatial(nn.Module):
    """Holds the place of the published prefix `spatial_vae.module`."""

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__()
        self.module = module


class OpenSoraVAE(ModelMixin, ConfigMixin):
    """Pixels in [-1, 1] to normalised latents and back; the defaults are the published VAE, 393 million parameters.

    Args:
        block_out_channels, layers_per_block, norm_num_groups: the spatial `AutoencoderKL`.
        temporal_*: the `TemporalVAE`.
        latent_scale, latent_shift: normalisation of the latents per channel, z' = (z - shift) / scale.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        temporal_filters: int = 128,
        temporal_num_res_blocks: int = 4,
        temporal_channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_num_groups: int = 32,
        latent_scale: Sequence[float] = (3.85, 2.32, 2.33, 3.06),
        latent_shift: Sequence[float] = (-0.10, 0.34, 0.27, 0.98),
    ) -> None:
        super().__init__()
        if len(block_out_channels) != 4:
            raise ValueError(f"block_out_channels: expected 4 levels (a factor of 8), got {len(block_out_channels)}")
        for name, values in (("latent_scale", latent_scale), ("latent_shift", latent_shift)):
            if len(values) != latent_channels:
                raise ValueError(
                    f"{name}: expected {latent_channels} values, one per latent channel, got {len(values)}"
                )
        spatial = AutoencoderKL(
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        self.spatial_vae = _Spatial(spatial)
        self.temporal_vae = TemporalVAE(
            latent_channels,
            latent_channels,
            temporal_filters,
            temporal_num_res_blocks,
            temporal_channel_multipliers,
            num_groups=temporal_num_groups,
        )
        self.register_buffer("scale", torch.tensor(latent_scale, dtype=torch.float32).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(latent_shift, dtype=torch.float32).view(1, -1, 1, 1, 1))

    @property
    def spatial(self) -> AutoencoderKL:
        return self.spatial_vae.module

    def drop_encoders(self) -> None:
        """Free what only `encode` needs, half of the weights; `encode` cannot be called any more."""
        for autoencoder in (self.spatial, self.temporal_vae):
            autoencoder.encoder = autoencoder.quant_conv = None

    def encode(self, pixels: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Latents of a clip; an image is a clip of one frame.

        Args:
            pixels: [B, 3, T, H, W] in [-1, 1]. Sizes that 8 does not divide lose their last rows and columns.
            sample: draw from the two posteriors, as Open-Sora does, rather than take their means.
            generator: for `sample`; used for sample after sample of the batch, frames before time.

        Returns:
            [B, c, latent_frames(T), H // 8, W // 8] float32, normalised.

        Raises:
            ValueError: not five dimensions, not three channels, smaller than 8 pixels.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < SPATIAL_FACTOR:
            raise ValueError(
                f"pixels: expected [B, 3, T, H, W] with H and W of {SPATIAL_FACTOR} or more, got {tuple(pixels.shape)}"
            )
        encoded = [self._encode(clip, sample, generator) for clip in pixels.to(self.dtype).transpose(1, 2)]
        return (torch.stack(encoded).float() - self.shift.float()) / self.scale.float()

    def _encode(self, frames: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        """[T, 3, H, W] -> [c, t, h, w], not yet normalised."""

        def pick(mean: Tensor, logvar: Tensor) -> Tensor:
            return sampled(mean, logvar, generator) if sample else mean

        spatial = []
        for images in frames.split(FRAMES_PER_ENCODE):
            posterior = self.spatial.encode(images).latent_dist
            spatial.append(pick(posterior.mean, posterior.logvar))
        clip = torch.cat(spatial).transpose(0, 1)[None] * SPATIAL_SCALE
        temporal = [pick(*self.temporal_vae.encode(chunk)) for chunk in clip.split(CHUNK_FRAMES, dim=2)]
        return torch.cat(temporal, dim=2)[0]

    def decode(
        self, latents: Tensor, num_frames: int, frames: Sequence[int] | None = None, *, checkpoint: bool = True
    ) -> Tensor:
        """Frames of a clip, only what they need being computed: equal to decoding everything and selecting.

        Args:
            latents: [B, c, t, h, w], normalised; gradients flow to it.
            num_frames: frames of the whole clip.
            frames: 0-based positions to decode, ascending; None: all.
            checkpoint: where a graph is built, keep only the input of each chunk and frame and decode it again in the backward.

        Returns:
            [B, 3, T, 8h, 8w] in about [-1, 1], not clamped, in the dtype of the weights.

        Raises:
            ValueError: `num_frames` does not belong to `t` latent frames; `frames` empty, unordered or out of range.
        """
        frames = self._check(latents, num_frames, frames)
        latents = (latents * self.scale.float() + self.shift.float()).to(self.dtype)
        run = _recomputed if checkpoint and torch.is_grad_enabled() and latents.requires_grad else _plain
        videos = [self._decode(latents[i : i + 1], num_frames, frames, run) for i in range(len(latents))]
        return torch.cat(videos)

    def _decode(self, latents: Tensor, num_frames: int, frames: list[int], run: Callable[..., Tensor]) -> Tensor:
        """One clip. Chunks and frames go one at a time: what a backward holds at once is one of them."""
        images = []
        for chunk in chunks(num_frames):
            wanted = [f - chunk.first_frame for f in frames if 0 <= f - chunk.first_frame < chunk.frames]
            if not wanted:
                continue
            part = latents[:, :, chunk.first_latent : chunk.first_latent + chunk.latents]
            decoded = run(self.temporal_vae.decode, part, chunk.frames)
            images += [run(self._decode_image, decoded[:, :, f]) for f in wanted]
        return torch.stack(images, dim=2)

    def _decode_image(self, latents: Tensor) -> Tensor:
        """[1, c, h, w] -> [1, 3, 8h, 8w]"""
        return self.spatial.decode(latents / SPATIAL_SCALE, return_dict=False)[0]

    def _check(self, latents: Tensor, num_frames: int, frames: Sequence[int] | None) -> list[int]:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents: expected [B, {channels}, t, h, w], got {tuple(latents.shape)}")
        if num_frames < 1 or latent_frames(num_frames) != latents.shape[2]:
            raise ValueError(
                f"latents: expected {latent_frames(max(num_frames, 0))} latent frames for num_frames={num_frames}, "
                f"got {latents.shape[2]}"
            )
        wanted = list(range(num_frames)) if frames is None else [int(frame) for frame in frames]
        if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= num_frames:
            raise ValueError(f"frames: expected ascending positions in 0..{num_frames - 1}, at least one, got {wanted}")
        return wanted


def _plain(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    return function(*arguments)


def _recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    return recompute(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
