"""Names of Wan's linear layers in diffusers and in Wan's own code, which ComfyUI follows."""

from __future__ import annotations

import re

_PAIRS = [
    (r"blocks\.(\d+)\.attn1\.to_(q|k|v)", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_(q|k|v)", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.attn2\.add_(k|v)_proj", r"blocks.\1.cross_attn.\2_img"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    (r"condition_embedder\.time_embedder\.linear_1", r"time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", r"time_embedding.2"),
    (r"condition_embedder\.time_proj", r"time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", r"text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", r"text_embedding.2"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", r"img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", r"img_emb.proj.3"),
    (r"proj_out", r"head.head"),
]
_BACK = [
    (r"blocks\.(\d+)\.self_attn\.(q|k|v)", r"blocks.\1.attn1.to_\2"),
    (r"blocks\.(\d+)\.self_attn\.o", r"blocks.\1.attn1.to_out.0"),
    (r"blocks\.(\d+)\.cross_attn\.(q|k|v)", r"blocks.\1.attn2.to_\2"),
    (r"blocks\.(\d+)\.cross_attn\.o", r"blocks.\1.attn2.to_out.0"),
    (r"blocks\.(\d+)\.cross_attn\.(k|v)_img", r"blocks.\1.attn2.add_\2_proj"),
    (r"blocks\.(\d+)\.ffn\.0", r"blocks.\1.ffn.net.0.proj"),
    (r"blocks\.(\d+)\.ffn\.2", r"blocks.\1.ffn.net.2"),
    (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"head\.head", "proj_out"),
]


def comfy_module_name(name: str) -> str:
    """ "blocks.0.attn1.to_q" -> "blocks.0.self_attn.q".

    Raises:
        ValueError: no linear layer of `WanTransformer3DModel`.
    """
    return _renamed(name, _PAIRS, "WanTransformer3DModel")


def model_module_name(name: str) -> str:
    """The inverse of `comfy_module_name`."""
    return _renamed(name, _BACK, "Wan's own code")


def _renamed(name: str, rules: list[tuple[str, str]], source: str) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"module: expected the name of a linear layer in {source}, got {name!r}")
