"""Which layers of Wan a LoRA may update."""

from __future__ import annotations

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_IMAGE_ATTENTION = ["add_k_proj", "add_v_proj"]
_FEED_FORWARD = ["ffn.net.0.proj", "ffn.net.2"]

LORA_TARGETS: dict[str, list[str]] = {
    "default": _ATTENTION,
    "attention": _ATTENTION,
    "attention+image": [*_ATTENTION, *_IMAGE_ATTENTION],
    "attention+ffn": [*_ATTENTION, *_FEED_FORWARD],
    "attention+image+ffn": [*_ATTENTION, *_IMAGE_ATTENTION, *_FEED_FORWARD],
}
"""Suffixes of module names. `default`: query, key, value and output of self- and cross-attention; `image` adds key and value of the
image tokens, which only models with an image encoder have."""
