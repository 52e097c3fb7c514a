"""Open-Sora on the meta device, for counting memory: the model and a clip's condition as a run has them, and the size of the encoders."""

from __future__ import annotations

import torch

from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.adapter import OpenSoraI2V
from vcd_fast.models.opensora.condition import OpenSoraCondition
from vcd_fast.models.opensora.meta import load_meta
from vcd_fast.models.opensora.settings import TINY, ModelSettings
from vcd_fast.models.opensora.vae import SPATIAL_FACTOR

T5_V1_1_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def shaped_model(settings: ModelSettings) -> OpenSoraI2V:
    """`load_meta`, which gives the weights the dtypes of `load_model`. Errors as there."""
    return load_meta(settings)


def shaped_condition(model: OpenSoraI2V, batch: int) -> OpenSoraCondition:
    """The condition of `batch` clips of the size in `model.settings`, without values; prompts as long as they may be."""
    config, settings = model.transformer.config, model.settings
    dtype = getattr(torch, settings.text_encoder_dtype)
    size = tuple(side // SPATIAL_FACTOR for side in settings.decoded_size)
    with torch.device("meta"):
        image = torch.empty(batch, config.in_channels, 1, *size)
        text = torch.empty(batch, config.model_max_length, config.caption_channels, dtype=dtype)
        return OpenSoraCondition(
            image, text, negative_text=torch.empty_like(text) if settings.negative_prompt else None
        )


def encoder_bytes(settings: ModelSettings) -> dict[str, int]:
    """Bytes of the weights of each encoder; a run holds one of them at a time, before the model is loaded.

    The published one is taken where the weights are not the tiny model's.
    """
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        text = tiny.tiny_text_encoder() if settings.weights == TINY else T5EncoderModel(T5Config(**T5_V1_1_XXL))
    width = 2 if settings.text_encoder_dtype == "bfloat16" else 4
    return {"text encoder": width * sum(parameter.numel() for parameter in text.parameters())}
