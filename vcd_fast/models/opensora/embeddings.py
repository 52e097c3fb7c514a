"""What Open-Sora's transformer adds to its tokens: patches, time, text, and positions in space and time.

The tables of positions are functions of sizes alone. They are computed in float32 at every forward and kept nowhere, so a model that
was built on the meta device, loaded in bfloat16 or cast afterwards has the same ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY_DIM = 256
THETA = 10000.0


def rope_frequencies(head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """10000^(-2i/d) for i < d/2, float32 [d/2] (RoFormer, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1 / THETA**exponents


def rope_table(frames: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each float32 [frames, d/2]; positions are latent frames from 0."""
    positions = torch.arange(frames, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(head_dim, device))
    return angles.cos(), angles.sin()


def apply_rope(tensor: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the interleaved pairs (2i, 2i+1) of [N, frames, heads, d] by the angles of their frame; in float32 at least, dtype kept."""
    cosine, sine = (part[:, None, :] for part in table)
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    even, odd = wide[..., 0::2], wide[..., 1::2]
    rotated = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return rotated.flatten(-2).to(tensor.dtype)


def position_table(rows: int, columns: int, dim: int, scale: float, device: torch.device) -> Tensor:
    """Sine and cosine positions of a grid of tokens, float32 [rows * columns, dim], columns fastest.

    Positions are divided by `scale` (resolution relative to the one the model was first trained at) and stretched to a square grid of
    the same area. The first half of the channels holds the column, the second the row.
    """
    base = round(math.sqrt(rows * columns))
    inverse = rope_frequencies(dim // 2, device)

    def axis(size: int) -> Tensor:
        grid = torch.arange(size, dtype=torch.float32, device=device) / scale * (base / size)
        angles = torch.outer(grid, inverse)
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    down, across = axis(rows)[:, None], axis(columns)[None]
    table = torch.cat((across.expand(rows, -1, -1), down.expand(-1, columns, -1)), dim=-1)
    return table.flatten(0, 1)


def sinusoid(values: Tensor) -> Tensor:
    """[B] -> float32 [B, 256]: cosines, then sines, of the values times 10000^(-k/128)."""
    half = FREQUENCY_DIM // 2
    # multiplied before it is divided, as the weights were trained: a last-place difference here is 1e-4 rad at time 1000
    exponents = -math.log(THETA) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class Rope(nn.Module):
    """Keeps the place of the published entry `rope.freqs`; `rope_table` computes what is used."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", rope_frequencies(head_dim))


class PatchEmbed(nn.Module):
    """Latents [B, c, T, H, W] -> tokens [B, frames, rows * columns, C]; sizes that patches do not divide are zero-padded at the end."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        missing = [-size % patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True)]
        if any(missing):
            latents = F.pad(latents, (0, missing[2], 0, missing[1], 0, missing[0]))
        return self.proj(latents).flatten(3).permute(0, 2, 3, 1)


class ScalarEmbed(nn.Module):
    """A number per sample (time or frames per second) -> [B, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(sinusoid(values).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


class CaptionEmbed(nn.Module):
    """T5 embeddings -> [B, L, C]. Holds the learned null caption, which takes the place of a negative prompt."""

    def __init__(self, caption_channels: int, dim: int, max_length: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(max_length, caption_channels) / caption_channels**0.5)
        self.y_proj = Mlp(caption_channels, dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)
