"""Latents to frames with gradients: the Wan VAE's decoder, one latent frame at a time.

The decoder is causal in time. Latent frame 0 gives frame 0, latent frame i gives frames 4i-3..4i, and all it needs of the past are
the last two frames that entered each of its causal convolutions: the cache. `AutoencoderKLWan` replaces the entries of its cache and
never writes into them, so one latent frame is a pure function (latent, *cache) -> (frames, *cache') and can be checkpointed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vcd_fast.frozen_conv import freeze_convolutions
from vcd_fast.models.wan.settings import TEMPORAL_FACTOR


def chunk_of_frame(frame: int) -> int:
    """The latent frame that frame `frame` comes from."""
    return (frame + TEMPORAL_FACTOR - 1) // TEMPORAL_FACTOR


class WanDecoder:
    """Decodes chosen frames of a clip, differentiably.

    Args:
        vae: `AutoencoderKLWan`, frozen. Its encoder is not used.
        context: "exact", or "truncated": frames are differentiated with respect to the latent of their own chunk only.
        checkpointing: what is recomputed in the backward, "chunk" by chunk or, within a chunk, "resnet" by resnet.
        frozen_conv: convolutions keep no input (`vcd_fast.frozen_conv`); patches the modules of this `vae`.
    """

    def __init__(
        self, vae: nn.Module, *, context: str = "exact", checkpointing: str = "chunk", frozen_conv: bool = True
    ) -> None:
        self.vae = vae
        self.context = context
        self.checkpointing = checkpointing
        if frozen_conv:
            freeze_convolutions(vae.decoder)
            freeze_convolutions(vae.post_quant_conv)
        if checkpointing == "resnet":
            _checkpoint_resnets(vae.decoder)

    def __call__(self, latents: Tensor, frames: Sequence[int] | None = None, *, checkpoint: bool = True) -> Tensor:
        """latents [B, 16, f, h, w], normalised -> float32 [B, T, 3, 8h, 8w] in [0, 1], the frames asked for.

        Latent frames after the last one needed are not decoded. `checkpoint=False` keeps every activation.

        Raises:
            ValueError: frames that are not ascending or not in the clip.
        """
        count = TEMPORAL_FACTOR * (latents.shape[2] - 1) + 1
        frames = list(range(count)) if frames is None else [int(frame) for frame in frames]
        if not frames or frames != sorted(set(frames)) or frames[0] < 0 or frames[-1] >= count:
            raise ValueError(f"frames: expected ascending, distinct positions in 0..{count - 1}, got {frames}")
        wanted = {chunk_of_frame(frame) for frame in frames}
        decoded = self._chunks(latents, wanted, checkpoint)
        picked = [decoded[chunk_of_frame(frame)][:, :, _position(frame)] for frame in frames]
        return torch.stack(picked, dim=1).float() * 0.5 + 0.5

    def _chunks(self, latents: Tensor, wanted: set[int], use_checkpoint: bool) -> dict[int, Tensor]:
        """Pixels in [-1, 1] of the wanted chunks."""
        vae = self.vae
        cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        decoded = {}
        with _without_autocast(latents.device):
            # Of all latents, though later ones are not needed: so the last bits of a frame do not depend on which are asked for.
            z = vae.post_quant_conv(denormalise(latents.to(vae.dtype), vae.config))
            for index in range(max(wanted) + 1):
                differentiated = torch.is_grad_enabled() and (self.context == "exact" or index in wanted)
                with torch.set_grad_enabled(differentiated):
                    arguments = (z[:, :, index : index + 1], index == 0, *cache)
                    if differentiated and use_checkpoint:
                        pixels, *cache = checkpoint(
                            self._chunk, *arguments, use_reentrant=False, preserve_rng_state=False
                        )
                    else:
                        pixels, *cache = self._chunk(*arguments)
                if self.context == "truncated":
                    cache = [entry.detach() if isinstance(entry, Tensor) else entry for entry in cache]
                if index in wanted:
                    decoded[index] = self._unpatched(pixels).clamp(-1, 1)
                del pixels
        return decoded

    def _chunk(self, z: Tensor, first: bool, *cache: Any) -> tuple[Any, ...]:
        entries = list(cache)
        pixels = self.vae.decoder(z, feat_cache=entries, feat_idx=[0], first_chunk=first)
        return (pixels, *entries)

    def _unpatched(self, pixels: Tensor) -> Tensor:
        """Undo the patches some VAEs of this class put into channels; Wan 2.1's has none."""
        if self.vae.config.patch_size is None:
            return pixels
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        return unpatchify(pixels, patch_size=self.vae.config.patch_size)


def denormalise(latents: Tensor, config: Any) -> Tensor:
    """Undo the per-channel normalisation the transformer works in; in the order of operations of the stock pipeline."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std)
    )
    return latents / (1.0 / std) + mean


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The VAE runs in the dtype of its weights. The meta device, on which memory is counted, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _position(frame: int) -> int:
    return 0 if frame == 0 else (frame - 1) % TEMPORAL_FACTOR


def _checkpoint_resnets(decoder: nn.Module) -> None:
    """Recompute every residual block of this decoder in the backward, also within a recomputed chunk."""
    for block in decoder.modules():
        if type(block).__name__ == "WanResidualBlock":
            block.forward = MethodType(_checkpointed_resnet, block)


def _checkpointed_resnet(
    self: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list[int] | None = None
) -> Tensor:
    plain = type(self).forward
    if feat_cache is None or not torch.is_grad_enabled():
        return plain(self, x, **({} if feat_cache is None else {"feat_cache": feat_cache, "feat_idx": feat_idx}))
    start = feat_idx[0]

    def pure(x: Tensor, *entries: Any) -> tuple[Any, ...]:
        cache = list(entries)
        return (plain(self, x, feat_cache=cache, feat_idx=[0]), *cache)

    used = 2  # a residual block has two cached convolutions
    out, *entries = checkpoint(
        pure, x, *feat_cache[start : start + used], use_reentrant=False, preserve_rng_state=False
    )
    feat_cache[start : start + used] = entries
    feat_idx[0] = start + used
    return out
