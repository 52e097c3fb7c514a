"""The part of Open-Sora's VAE that compresses time: latents of single frames, four frames to one.

Convolutions look back only, but the group norms take their statistics over all frames of a call, so the frames of a chunk depend on one
another in both directions. Names of modules are those of the published weights (`hpcai-tech/OpenSora-VAE-v1.2`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5
LOGVAR_RANGE = (-30.0, 20.0)


class CausalConv3d(nn.Module):
    """Convolution over [B, C, T, H, W] that sees past frames only (zeros before the first); height and width are kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.before = kernel - stride
        side = kernel // 2
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel, stride=(stride, 1, 1), padding=(0, side, side), bias=bias
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.before:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 0, self.before, 0))
        return self.conv(hidden_states)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPSILON)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPSILON)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False)
        else:
            self.conv3 = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden_states)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + self.conv3(hidden_states)


def _res_blocks(in_channels: int, out_channels: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count))


class Encoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        halves: Sequence[bool],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, bias=False)
        before = [widths[0], *widths[:-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(inner, outer, blocks, groups) for inner, outer in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride=2) if half else nn.Identity()
            for width, half in zip(widths, halves, strict=False)
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], blocks, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1], eps=EPSILON)
        self.conv2 = CausalConv3d(widths[-1], out_channels, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.conv_in(hidden_states)
        for level, res_blocks in enumerate(self.block_res_blocks):
            for res_block in res_blocks:
                hidden_states = res_block(hidden_states)
            if level < len(self.conv_blocks):
                hidden_states = self.conv_blocks[level](hidden_states)
        for res_block in self.res_blocks:
            hidden_states = res_block(hidden_states)
        return self.conv2(F.silu(self.norm1(hidden_states)))


class Decoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        halves: Sequence[bool],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, widths[-1], 3)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], blocks, groups)
        above = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(inner, outer, blocks, groups) for inner, outer in zip(above, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if half else nn.Identity()
            for width, half in zip(widths[1:], halves, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0], eps=EPSILON)
        self.conv_out = CausalConv3d(widths[0], out_channels, 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.conv1(hidden_states)
        for res_block in self.res_blocks:
            hidden_states = res_block(hidden_states)
        for level in reversed(range(len(self.block_res_blocks))):
            for res_block in self.block_res_blocks[level]:
                hidden_states = res_block(hidden_states)
            if level and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                hidden_states = _channels_to_time(self.conv_blocks[level - 1](hidden_states))
        return self.conv_out(F.silu(self.norm1(hidden_states)))


def _channels_to_time(hidden_states: Tensor) -> Tensor:
    """[B, 2C, T, H, W] -> [B, C, 2T, H, W]: neighbouring channels become neighbouring frames."""
    split = hidden_states.unflatten(1, (-1, 2))
    return split.permute(0, 1, 3, 2, 4, 5).flatten(2, 3)


class TemporalVAE(nn.Module):
    """Autoencoder over time of latents [B, C, T, H, W]; the defaults are the published one, 310 million parameters."""

    def __init__(
        self,
        channels: int = 4,
        latent_channels: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample: expected {len(channel_multipliers) - 1} entries, one fewer than channel_multipliers, "
                f"got {len(temporal_downsample)}"
            )
        widths = [filters * multiplier for multiplier in channel_multipliers]
        self.time_factor = 2 ** sum(temporal_downsample)
        levels = (widths, num_res_blocks, temporal_downsample, num_groups)
        self.encoder = Encoder(channels, 2 * latent_channels, *levels)
        self.decoder = Decoder(latent_channels, channels, *levels)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] -> mean and log variance of [B, c, ceil(T / 4), H, W]; zero frames are put before the first."""
        missing = -frames.shape[2] % self.time_factor
        padded = F.pad(frames, (0, 0, 0, 0, missing, 0))
        mean, logvar = self.quant_conv(self.encoder(padded)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """[B, c, t, H, W] -> [B, C, num_frames, H, W]; what decodes to the zero frames of `encode` is dropped.

        Raises:
            ValueError: `num_frames` does not make `t` latent frames.
        """
        if -(-num_frames // self.time_factor) != latents.shape[2]:
            raise ValueError(
                f"num_frames: {latents.shape[2]} latent frames decode to {self.time_factor * (latents.shape[2] - 1) + 1} to "
                f"{self.time_factor * latents.shape[2]} frames, got {num_frames}"
            )
        return self.decoder(self.post_quant_conv(latents))[:, :, -num_frames % self.time_factor :]


def sampled(mean: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw from the Gaussian of that mean and log variance, on the generator's device."""
    device = generator.device if generator is not None else mean.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
    return mean + torch.exp(logvar / 2) * noise.to(mean.device)
