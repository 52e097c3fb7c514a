"""Blocks of Open-Sora's transformer. Tokens are [B, T, S, C]: latent frames T, patches of a frame S."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vcd_fast.models.opensora.attention import Text, attention, cross_attention
from vcd_fast.models.opensora.embeddings import Mlp, apply_rope

EPSILON = 1e-6


def modulated_norm(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then an affine map that the timestep chooses."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Tokens [N, L, C] attend to each other; queries and keys are RMS-normalised per head, then (over time) rotated."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = "sdpa"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=EPSILON) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=EPSILON) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        return self.proj(attention(query.to(value.dtype), key.to(value.dtype), value, self.backend).flatten(2))


class CrossAttention(nn.Module):
    """Tokens [B, N, C] attend to the text of their own sample."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = "sdpa"
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, text: Text) -> Tensor:
        query = self.q_linear(hidden_states).unflatten(-1, (self.num_heads, -1))
        key, value = self.kv_linear(text.tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(cross_attention(query, key, value, text, self.backend).flatten(2))


class Block(nn.Module):
    """Self-attention (within frames, or over time at every place), cross-attention to the text, MLP; adaptive norms."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = SelfAttention(dim, num_heads, qk_norm)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)

    def forward(
        self, hidden_states: Tensor, text: Text, modulation: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """hidden_states [B, T, S, C]; modulation [B, T or 1, 6, C], a row per frame; rope only over time -> [B, T, S, C]."""
        rows = (self.scale_shift_table + modulation).unsqueeze(3).unbind(2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows
        attended = self._attend(modulated_norm(hidden_states, shift, scale), rope)
        hidden_states = hidden_states + gate * attended
        hidden_states = hidden_states + self.cross_attn(hidden_states.flatten(1, 2), text).view_as(hidden_states)
        return hidden_states + mlp_gate * self.mlp(modulated_norm(hidden_states, mlp_shift, mlp_scale))

    def _attend(self, hidden_states: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch = hidden_states.shape[0]
        if self.temporal:
            hidden_states = hidden_states.transpose(1, 2)
            return self.attn(hidden_states.flatten(0, 1), rope).unflatten(0, (batch, -1)).transpose(1, 2)
        return self.attn(hidden_states.flatten(0, 1)).unflatten(0, (batch, -1))


class FinalLayer(nn.Module):
    """Tokens [B, T, S, C] -> patches [B, T, S, patch volume * channels]."""

    def __init__(self, dim: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, patch_volume * out_channels)

    def forward(
        self, hidden_states: Tensor, time: Tensor, clean_time: Tensor | None, frame_mask: Tensor | None
    ) -> Tensor:
        """time [B, C] for generated frames (True in `frame_mask` [B, T]), `clean_time` [B, C] for conditioning frames.

        The published weights were trained with conditioning frames normalised a second time, after the modulation of generated
        ones; it changes nothing that a sampler uses, and is kept so that the raw output agrees.
        """

        def modulate(states: Tensor, embedding: Tensor) -> Tensor:
            shift, scale = (self.scale_shift_table + embedding[:, None])[:, :, None, None].unbind(1)
            return modulated_norm(states, shift, scale)

        hidden_states = modulate(hidden_states, time)
        if frame_mask is not None:
            clean = modulate(hidden_states, clean_time)
            hidden_states = torch.where(frame_mask[:, :, None, None], hidden_states, clean)
        return self.linear(hidden_states)
