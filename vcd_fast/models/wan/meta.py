"""The model's shapes without its weights: for `--dry-run` and whatever else counts before it loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.adapter import WanI2V
from vcd_fast.models.wan.loading import read_config, resolve
from vcd_fast.models.wan.settings import TINY, TINY_NAMES, ModelSettings


def load_meta(settings: ModelSettings) -> WanI2V:
    """The model on the meta device. Of weights on the hub, only the transformer's `config.json` is fetched.

    Raises:
        ValueError, OSError: as of `load_model`.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    with torch.device("meta"):
        if settings.weights in TINY_NAMES:
            transformer = tiny.tiny_transformer(image_encoder=settings.weights == TINY)
        else:
            transformer = WanTransformer3DModel.from_config(_transformer_config(settings))
        return WanI2V(transformer, AutoencoderKLWan(), settings)


def _transformer_config(settings: ModelSettings) -> dict:
    weights = settings.weights
    if weights is None or Path(weights).expanduser().exists() or weights.count("/") != 1:
        return read_config(resolve(settings, ["transformer"]), "transformer")
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(weights, "transformer/config.json", revision=settings.revision)
    except OSError as error:
        raise OSError(
            f"model.weights: transformer/config.json of {weights} is not on this machine and could not be downloaded "
            f"({type(error).__name__}); name a local folder instead"
        ) from error
    return json.loads(Path(path).read_text())
