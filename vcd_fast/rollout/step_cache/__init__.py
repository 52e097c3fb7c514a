"""TeaCache (arXiv 2411.19108) for samplers with gradients: steps that would change little repeat the effect of the last computed one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vcd_fast.rollout.step_cache.policy import Rule, describe_map, skip_map

if TYPE_CHECKING:
    from vcd_fast.rollout.step_cache.hooks import StepCache, StepCacheConfig, apply_step_cache, remove_step_cache

__all__ = [
    "Rule",
    "StepCache",
    "StepCacheConfig",
    "apply_step_cache",
    "describe_map",
    "remove_step_cache",
    "skip_map",
]


def __getattr__(name: str) -> Any:
    # diffusers is imported with the first model, not with the settings
    if name in ("StepCache", "StepCacheConfig", "apply_step_cache", "remove_step_cache"):
        return getattr(importlib.import_module(f"{__name__}.hooks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
