"""Wan on the meta device, for counting memory: the model and a clip's condition as a run has them, and the size of the encoders."""

from __future__ import annotations

import torch
from torch import nn

from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.adapter import MASK_CHANNELS, WanI2V, cast_keeping_float32
from vcd_fast.models.wan.condition import TEXT_TOKENS, WanCondition
from vcd_fast.models.wan.loading import config_or
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
        channels = model.vae.config.z_dim + MASK_CHANNELS
        return WanCondition(prompts[0], prompts[1], torch.empty(batch, channels, *settings.latent_shape), image)


def encoder_bytes(settings: ModelSettings) -> dict[str, int]:
    """Bytes of the weights of each encoder; a run holds one of them at a time, before the model is loaded.

    As the configurations in the folder say; as published where there are none.
    """
    width = 4 if settings.dtype == "float32" else 2
    with torch.device("meta"):
        encoders = {"text encoder": (_text_encoder(settings), width), "image encoder": (_image_encoder(settings), 4)}
    return {
        name: size * sum(p.numel() for p in module.parameters()) for name, (module, size) in encoders.items() if module
    }


def _text_encoder(settings: ModelSettings) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    if settings.weights in TINY_NAMES:
        return tiny.tiny_text_encoder()
    return UMT5EncoderModel(UMT5Config(**config_or(settings, "text_encoder", UMT5_XXL)))


def _image_encoder(settings: ModelSettings) -> nn.Module | None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if settings.weights in TINY_NAMES:
        return tiny.tiny_image_encoder()
    if config_or(settings, "transformer", {"image_dim": CLIP_VIT_H["hidden_size"]}).get("image_dim") is None:
        return None
    return CLIPVisionModel(CLIPVisionConfig(**config_or(settings, "image_encoder", CLIP_VIT_H)))
