"""STDiT3, the transformer of Open-Sora 1.2, with the names and shapes of the published weights (`hpcai-tech/OpenSora-STDiT-v3`).

A clip's latents are cut into patches; blocks that attend within every frame alternate with blocks that attend over time at every
place. A conditioning frame is told apart by its timestep alone: its modulation is that of time 0. The class is a diffusers model:
`from_pretrained`, `save_pretrained`, `add_adapter` and `enable_gradient_checkpointing` work as on diffusers' own.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vcd_fast.models.opensora.attention import pack_text, resolve_backend
from vcd_fast.models.opensora.blocks import Block, CrossAttention, FinalLayer, SelfAttention
from vcd_fast.models.opensora.embeddings import (
    CaptionEmbed,
    PatchEmbed,
    Rope,
    ScalarEmbed,
    position_table,
    rope_table,
)


class STDiT3(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Space-time diffusion transformer; the defaults are XL/2, 1.2 billion parameters.

    Args:
        in_channels: channels of the latents; with `pred_sigma` the output has twice as many, of which the first half is the velocity.
        patch_size: latent frames, rows and columns per token.
        input_sq_size: side in pixels of the square that positions are scaled to.
        caption_channels, model_max_length: shape of the null caption, [max_length, channels].

    Raises:
        ValueError: sizes that do not divide each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (a list is what accelerate expects)
    _repeated_blocks = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        qk_norm: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads) or hidden_size % 4:
            raise ValueError(
                f"hidden_size: expected a multiple of 4 and of twice num_heads ({2 * num_heads}), got {hidden_size}"
            )
        self.patch_size = tuple(patch_size)
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.head_dim = hidden_size // num_heads
        self.attention_backend = "sdpa"
        self.gradient_checkpointing = False

        self.rope = Rope(self.head_dim)
        self.x_embedder = PatchEmbed(self.patch_size, in_channels, hidden_size)
        self.t_embedder = ScalarEmbed(hidden_size)
        self.fps_embedder = ScalarEmbed(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbed(caption_channels, hidden_size, model_max_length)

        def blocks(temporal: bool) -> nn.ModuleList:
            return nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth))

        self.spatial_blocks = blocks(temporal=False)
        self.temporal_blocks = blocks(temporal=True)
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size), self.out_channels)

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention with `sdpa` (or its other name, `native`) or `xformers`.

        Raises:
            ValueError: unknown backend.
            ImportError: xformers cannot be imported here.
        """
        self.attention_backend = resolve_backend(backend)
        for module in self.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.backend = self.attention_backend

    def reset_attention_backend(self) -> None:
        self.set_attention_backend("sdpa")

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        *,
        height: float,
        width: float,
        fps: float | Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            hidden_states: [B, in_channels, T, H, W] latents.
            timestep: [B] in 0..1000, 1000 = noise; read in float32 whatever the dtype of the weights.
            encoder_hidden_states: [B, L, caption_channels] text.
            encoder_attention_mask: [B, L] bool, True where a text token counts; None when all do.
            frame_mask: [B, frames of patches] bool, True where a frame is generated, False where it conditions; None: all generated.
            height, width: size of the video in pixels, as it was asked for (276, not the 272 that are decoded).
            fps: frames per second, one number or [B].

        Returns:
            [B, out_channels, T, H, W] in float32 (float64 if the weights are), in a `Transformer2DModelOutput` or, without
            `return_dict`, a tuple.

        Raises:
            ValueError: shapes that do not go together.
        """
        self._check(hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, frame_mask)
        batch, _, *size = hidden_states.shape
        frames, rows, columns = (math.ceil(s / p) for s, p in zip(size, self.patch_size, strict=True))
        device, dtype = hidden_states.device, self.x_embedder.proj.weight.dtype

        tokens = self.x_embedder(hidden_states.to(dtype))
        scale = math.sqrt(height * width) / self.config.input_sq_size
        tokens = tokens + position_table(rows, columns, tokens.shape[-1], scale, device).to(dtype)

        if not isinstance(fps, Tensor):
            fps = torch.full((batch,), float(fps), device=device)
        rate = self.fps_embedder(fps)
        time = self.t_embedder(timestep) + rate
        clean_time = None if frame_mask is None else self.t_embedder(torch.zeros_like(timestep)) + rate
        modulation = self._modulation(time, clean_time, frame_mask)

        text = self.y_embedder(encoder_hidden_states.to(dtype))
        text = pack_text(text, encoder_attention_mask, self.attention_backend)
        rope = rope_table(frames, self.head_dim, device)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = self._run(spatial, tokens, text, modulation)
            tokens = self._run(temporal, tokens, text, modulation, rope)

        patches = self.final_layer(tokens, time, clean_time, frame_mask)
        output = self._unpatchify(patches, (frames, rows, columns), size)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run(self, block: Block, tokens: Tensor, *arguments: object) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, tokens, *arguments)
        return block(tokens, *arguments)

    def _modulation(self, time: Tensor, clean_time: Tensor | None, frame_mask: Tensor | None) -> Tensor:
        """[B, T or 1, 6, C]: what every block adds to its own table, a row per frame where frames differ."""
        table = self.t_block(time).unflatten(-1, (6, -1))[:, None]
        if frame_mask is None:
            return table
        clean = self.t_block(clean_time).unflatten(-1, (6, -1))[:, None]
        return torch.where(frame_mask[:, :, None, None], table, clean)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int], size: list[int]) -> Tensor:
        """[B, T, S, pt * ph * pw * c], c fastest -> [B, c, *size]; the padding is cut off."""
        patches = patches.unflatten(2, grid[1:]).unflatten(-1, (*self.patch_size, self.out_channels))
        whole = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(2, 3).flatten(3, 4).flatten(4, 5)
        return whole[:, :, : size[0], : size[1], : size[2]]

    def _check(
        self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor | None, frame_mask: Tensor | None
    ) -> None:
        channels, captions = self.config.in_channels, self.config.caption_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"hidden_states: expected [B, {channels}, T, H, W], got {tuple(latents.shape)}")
        batch = latents.shape[0]
        if timestep.shape != (batch,):
            raise ValueError(f"timestep: expected [{batch}], one per sample, got {tuple(timestep.shape)}")
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != captions:
            raise ValueError(f"encoder_hidden_states: expected [{batch}, L, {captions}], got {tuple(text.shape)}")
        if text_mask is not None and (text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool):
            raise ValueError(
                f"encoder_attention_mask: expected {tuple(text.shape[:2])} of torch.bool, got {tuple(text_mask.shape)} "
                f"of {text_mask.dtype}"
            )
        frames = math.ceil(latents.shape[2] / self.patch_size[0])
        if frame_mask is not None and (frame_mask.shape != (batch, frames) or frame_mask.dtype != torch.bool):
            raise ValueError(
                f"frame_mask: expected ({batch}, {frames}) of torch.bool, got {tuple(frame_mask.shape)} of {frame_mask.dtype}"
            )
