"""Open-Sora 1.2 at toy size: the same classes, a million seeded random weights.

For tests and for trying a training setup on a CPU in minutes. Nothing in it was trained: its videos are noise.
"""

from __future__ import annotations

import torch
from torch import nn

from vcd_fast.models.opensora.transformer import STDiT3
from vcd_fast.models.opensora.vae import OpenSoraVAE
from vcd_fast.models.random_weights import seeded

TEXT_DIM = 32


def tiny_transformer(dtype: torch.dtype = torch.float32) -> STDiT3:
    """2 x 2 blocks of width 64; the same weights at every call."""
    with seeded("transformer"):
        model = STDiT3(hidden_size=64, depth=2, num_heads=4, caption_channels=TEXT_DIM)
    return _cast(model, dtype)


def tiny_vae(dtype: torch.dtype = torch.float32) -> OpenSoraVAE:
    with seeded("vae"):
        model = OpenSoraVAE(
            block_out_channels=(8, 16, 32, 32),
            layers_per_block=1,
            norm_num_groups=4,
            temporal_filters=8,
            temporal_num_res_blocks=1,
            temporal_num_groups=4,
        )
    return _cast(model, dtype)


def tiny_text_encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=384,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with seeded("text_encoder"):
        model = T5EncoderModel(config)
    return _cast(model, dtype)


def tiny_tokenizer() -> object:
    """One token per byte; needs no vocabulary file."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    # not by the model's own method: diffusers' warns about parts kept in float32 where there are none
    return nn.Module.to(model.eval(), dtype)
