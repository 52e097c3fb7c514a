"""Wan on the meta device, for counting memory: the model and a clip's condition as a run has them, and the size of the encoders."""

from __future__ import annotations

import torch

from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.adapter import CONDITION_CHANNELS, WanI2V, cast_keeping_float32
from vcd_fast.models.wan.condition import TEXT_TOKENS, WanCondition
from vcd_fast.models.wan.meta import load_meta
from vcd_fast.models.wan.published import CLIP_VIT_H, UMT5_XXL
from vcd_fast.models.wan.settings import TINY_NAMES, ModelSettings


def shaped_model(settings: ModelSettings) -> WanI2V:
    """`load_meta`, in the dtypes that `load_model` gives the weights. Errors as there."""
    model = load_meta(settings)
    cast_keeping_float32(model.transformer, getattr(torch, settings.dtype))
    cast_keeping_float32(model.vae, getattr(torch, settings.vae_dtype))
    return model


def shaped_condition(model: WanI2V, batch: int) -> WanCondition:
    """The condition of `batch` clips of the size in `model.settings`, without values."""
    config, settings = model.transformer.config, model.settings
    text_dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    image = None
    with torch.device("meta"):
        if config.image_dim is not None:
            side = tiny.IMAGE_SIZE // 8 if settings.weights in TINY_NAMES else 224 // 14
            image = torch.empty(batch, side * side + 1, config.image_dim)
        prompts = torch.empty(2, batch, TEXT_TOKENS, config.text_dim, dtype=text_dtype)
        return WanCondition(
            prompts[0], prompts[1], torch.empty(batch, CONDITION_CHANNELS, *settings.latent_shape), image
        )


def encoder_bytes(settings: ModelSettings) -> dict[str, int]:
    """Bytes of the weights of each encoder; a run holds one of them at a time, before the model is loaded.

    The published ones are taken where the weights are not the tiny model's.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    small = settings.weights in TINY_NAMES
    with torch.device("meta"):
        text = tiny.tiny_text_encoder() if small else UMT5EncoderModel(UMT5Config(**UMT5_XXL))
        image = tiny.tiny_image_encoder() if small else CLIPVisionModel(CLIPVisionConfig(**CLIP_VIT_H))
    width = 4 if settings.dtype == "float32" else 2
    counts = {"text encoder": (text, width), "image encoder": (image, 4)}
    return {name: size * sum(p.numel() for p in module.parameters()) for name, (module, size) in counts.items()}
