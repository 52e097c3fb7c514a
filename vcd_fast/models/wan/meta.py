"""The model's shapes without its weights: for `--dry-run` and whatever else counts before it loads."""

from __future__ import annotations

from pathlib import Path

import torch

from vcd_fast.models.hub import fetch_config, read_json
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
            transformer, vae = tiny.tiny_transformer(image_encoder=settings.weights == TINY), tiny.tiny_vae()
        else:
            transformer = WanTransformer3DModel.from_config(_transformer_config(settings))
            vae = AutoencoderKLWan()  # one VAE for all of Wan 2.1
        return WanI2V(transformer, vae, settings)


def _transformer_config(settings: ModelSettings) -> dict:
    weights = settings.weights
    if weights is None or Path(weights).expanduser().exists() or weights.count("/") != 1:
        return read_config(resolve(settings, ["transformer"]), "transformer")
    return read_json(fetch_config(weights, "transformer/config.json", settings.revision, "weights"))
