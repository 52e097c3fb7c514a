"""Wan 2.1 image-to-video: `ModelSettings`, `load_encoder`, `load_model`, `load_meta`, `missing_weights`, `LORA_TARGETS` (see `vcd_fast.models.base.family`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vcd_fast.models.wan.lora_keys import comfy_module_name, model_module_name
from vcd_fast.models.wan.settings import DEFAULT_PRESET, ModelSettings
from vcd_fast.models.wan.targets import LORA_TARGETS

if TYPE_CHECKING:
    from vcd_fast.models.wan.adapter import load_model
    from vcd_fast.models.wan.encoder import load_encoder
    from vcd_fast.models.wan.loading import missing_weights
    from vcd_fast.models.wan.meta import load_meta
    from vcd_fast.models.wan.shapes import encoder_bytes, shaped_condition, shaped_model
    from vcd_fast.models.wan.time_embedding import fill_time_embedding

__all__ = [
    "DEFAULT_PRESET",
    "LORA_TARGETS",
    "ModelSettings",
    "comfy_module_name",
    "encoder_bytes",
    "fill_time_embedding",
    "load_encoder",
    "load_meta",
    "load_model",
    "missing_weights",
    "model_module_name",
    "shaped_condition",
    "shaped_model",
]

_HOMES = {
    "encoder_bytes": "shapes",
    "fill_time_embedding": "time_embedding",
    "load_encoder": "encoder",
    "load_meta": "meta",
    "load_model": "adapter",
    "missing_weights": "loading",
    "shaped_condition": "shapes",
    "shaped_model": "shapes",
}


def __getattr__(name: str) -> Any:
    # Their modules pull in more than a look at the settings should.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
