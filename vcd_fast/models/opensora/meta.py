"""The model's shapes without its weights: for `--dry-run` and whatever else counts before it loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vcd_fast.models.hub import fetch_config
from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.adapter import OpenSoraI2V
from vcd_fast.models.opensora.files import TRANSFORMER_PART, VAE_PART, Part, source_of
from vcd_fast.models.opensora.loading import empty_transformer, empty_vae
from vcd_fast.models.opensora.settings import TINY, ModelSettings
from vcd_fast.models.opensora.transformer import STDiT3
from vcd_fast.models.opensora.vae import OpenSoraVAE


def load_meta(settings: ModelSettings) -> OpenSoraI2V:
    """The model on the meta device, in the dtypes of `settings`. Of a folder only `config.json` is read. Nothing is fetched for the
    published models, which are what the classes make by default; of others on the hub, `config.json`.

    Raises:
        ValueError, OSError: as of `load_model`, weights apart.
    """
    if settings.weights == TINY:
        with torch.device("meta"):
            transformer, vae = tiny.tiny_transformer(), tiny.tiny_vae()
    else:
        transformer, vae = _empty(settings, TRANSFORMER_PART), _empty(settings, VAE_PART)
    # not by the models' own method: diffusers' warns about parts kept in float32 where there are none
    nn.Module.to(transformer, getattr(torch, settings.dtype))
    nn.Module.to(vae, getattr(torch, settings.vae_dtype))
    return OpenSoraI2V(transformer, vae, settings)


def _empty(settings: ModelSettings, part: Part) -> STDiT3 | OpenSoraVAE:
    source, revision = source_of(settings, part)
    if source == part.published and revision is None:
        with torch.device("meta"):
            return STDiT3() if part is TRANSFORMER_PART else OpenSoraVAE()
    folder = source
    if not isinstance(source, Path):
        folder = fetch_config(source, "config.json", revision, part.setting).parent
    return empty_transformer(folder) if part is TRANSFORMER_PART else empty_vae(folder)
