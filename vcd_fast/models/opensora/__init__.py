"""Open-Sora 1.2 image-to-video: `ModelSettings`, `load_encoder`, `load_model`, `load_meta`, `missing_weights`, `LORA_TARGETS` (see `vcd_fast.models.base.family`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcd_fast.models.opensora.settings import DEFAULT_PRESET, ModelSettings
from vcd_fast.models.opensora.targets import LORA_TARGETS

if TYPE_CHECKING:
    from vcd_fast.models.opensora.adapter import load_model
    from vcd_fast.models.opensora.encoder import load_encoder
    from vcd_fast.models.opensora.files import missing_weights
    from vcd_fast.models.opensora.lora_keys import load_vader, save_vader
    from vcd_fast.models.opensora.meta import load_meta
    from vcd_fast.models.opensora.shapes import encoder_bytes, shaped_condition, shaped_model

__all__ = [
    "DEFAULT_PRESET",
    "LORA_FORMATS",
    "LORA_TARGETS",
    "ModelSettings",
    "encoder_bytes",
    "load_encoder",
    "load_meta",
    "load_model",
    "load_vader",
    "missing_weights",
    "save_vader",
    "shaped_condition",
    "shaped_model",
]


def _save_vader(path: Path, weights: Any) -> Path:
    from vcd_fast.models.opensora.lora_keys import save_vader

    return save_vader(path, weights)


LORA_FORMATS: dict[str, Callable[[Path, Any], Path]] = {"vader": _save_vader}
"""formats of LoRA files that only this family has, and what writes them"""

_HOMES = {
    "encoder_bytes": "shapes",
    "load_encoder": "encoder",
    "load_meta": "meta",
    "load_model": "adapter",
    "load_vader": "lora_keys",
    "missing_weights": "files",
    "save_vader": "lora_keys",
    "shaped_condition": "shapes",
    "shaped_model": "shapes",
}


def __getattr__(name: str) -> Any:
    # Their modules pull in more than a look at the settings should.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
