"""The model's shapes without its weights: for `--dry-run` and whatever else counts before it loads."""

from __future__ import annotations

import torch

from vcd_fast.models.hub import fetch_config, read_json
from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.adapter import WanI2V
from vcd_fast.models.wan.loading import config_or, folder_of, read_config
from vcd_fast.models.wan.published import TRANSFORMERS
from vcd_fast.models.wan.settings import TINY, TINY_NAMES, ModelSettings


def load_meta(settings: ModelSettings) -> WanI2V:
    """The model on the meta device.

    Read are the transformer's `config.json`, from the folder or the hub, and that of a VAE in the folder; for the published models
    (`vcd_fast.models.wan.published`) nothing.

    Raises:
        ValueError, OSError: as of `load_model`, weights apart.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    with torch.device("meta"):
        if settings.weights in TINY_NAMES:
            transformer, vae = tiny.tiny_transformer(image_encoder=settings.weights == TINY), tiny.tiny_vae()
        else:
            transformer = WanTransformer3DModel.from_config(_transformer_config(settings))
            # one VAE for all of Wan 2.1, what its class makes by default; a folder may hold another
            vae = AutoencoderKLWan.from_config(config_or(settings, "vae", {}))
        return WanI2V(transformer, vae, settings)


def _transformer_config(settings: ModelSettings) -> dict:
    folder = folder_of(settings)
    if folder is not None:
        return read_config(folder, "transformer")
    if settings.weights in TRANSFORMERS and settings.revision is None:
        return TRANSFORMERS[settings.weights]
    return read_json(fetch_config(settings.weights, "transformer/config.json", settings.revision, "weights"))
