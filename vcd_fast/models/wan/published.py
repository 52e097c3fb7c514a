"""Shapes of the published Wan 2.1 I2V transformers: what is known of them without their files."""

from __future__ import annotations

from typing import Any


def _transformer(heads: int, layers: int, feed_forward: int) -> dict[str, Any]:
    width = 128 * heads
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": feed_forward,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": 1280,
        "added_kv_proj_dim": width,
        "rope_max_seq_len": 1024,
    }


TRANSFORMERS = {
    "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers": _transformer(12, 30, 8960),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _transformer(40, 40, 13824),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _transformer(40, 40, 13824),
}
"""hub name -> `config.json` of the transformer: 1,564,428,608 parameters, and 16,394,878,784 of the two larger ones"""

UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
"""the text encoder of all of Wan 2.1"""

CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
}
"""the image encoder of Wan 2.1 I2V"""
