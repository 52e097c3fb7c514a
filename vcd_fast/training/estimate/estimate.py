"""Peak memory of a run by phase and part, from its configuration alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

from vcd_fast.models.base import family
from vcd_fast.training.estimate.resident import Resident, resident
from vcd_fast.training.estimate.simulate import Counts, count_decode, count_window
from vcd_fast.training.settings import RunConfig

T = TypeVar("T")
GIB = 2**30
CONTEXT = GIB // 2
"""of a GPU, taken by its driver and libraries before the first tensor"""
SLACK = 0.1
"""of a step's peak, for what is not counted: workspaces of kernels, blocks of the allocator, fragmentation"""
ENCODER_SLACK = GIB // 4
"""of an encoder, whose activations are not counted"""
BEFORE_STEPS = ("encode", "load")
DECODE_ONLY = ("vae_dtype", "frozen_conv", "decode_context", "decode_checkpointing")
WINDOW_ONLY = ("guidance_scale", "guidance_gradient", "guidance_passes", "negative_prompt")
"""settings of the model that matter to one half of a step only; the other is not counted again when they change"""
RESIDENT_ONLY = ("quantization",)


@dataclasses.dataclass(frozen=True)
class Phase:
    """The worst moment of a phase: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What a GPU has to have for it, with room for what is not counted."""
        slack = ENCODER_SLACK if self.name in BEFORE_STEPS else round(SLACK * self.total)
        return self.total + slack + CONTEXT


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Peak memory of one GPU."""

    phases: tuple[Phase, ...]
    resident: Resident
    saved: dict[str, int]
    """bytes that autograd keeps: `window` after the rollout, `decode` after decoding"""
    lora_numbers: int

    @property
    def peak(self) -> Phase:
        """The phase that takes most, room for what is not counted included."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def step_peak(self) -> Phase:
        """Of the phases of a step, that which takes most."""
        return max((phase for phase in self.phases if phase.name not in BEFORE_STEPS), key=lambda phase: phase.total)

    @property
    def needed(self) -> int:
        return self.peak.needed

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "needed_bytes": self.needed,
            "peak_phase": self.peak.name,
            "phases": {
                phase.name: {"bytes": phase.total, "needed_bytes": phase.needed, "parts": phase.parts}
                for phase in self.phases
            },
            "resident_bytes": dataclasses.asdict(self.resident),
            "saved_bytes": self.saved,
            "lora_parameters": self.lora_numbers,
        }


def estimate(config: RunConfig, gpus: int = 1) -> Estimate:
    """What a run of `config` takes at most on each of `gpus` GPUs. Nothing is loaded and no GPU touched.

    Raises:
        ValueError, OSError: what would stop the run at its start, weights apart.
    """
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {gpus}")
    window, decode = _window(config), _decode(config)
    base = _resident(config, window.lora, gpus)
    always = base.parts()
    gathered = {"gathered": base.gathered + base.restored} if base.gathered + base.restored else {}
    cached = _step_cache(config, window.tokens)
    kept = {"window": window.saved["window"], **cached}
    phases = [Phase("encode", {"encoders": max(_encoders(config).values())})]
    if base.unsharded > base.transformer:
        phases.append(Phase("load", {"weights": base.unsharded + base.vae}))
    phases += [
        Phase("rollout", {**always, **gathered, **window.peaks["rollout"], **cached}),
        Phase("decode", {**always, **kept, **decode.peaks["decode"]}),
        Phase("reward", {**always, **kept, **decode.peaks["reward"]}),
        Phase("backward", {**always, **gathered, **window.peaks["backward"], **cached}),
        Phase("optimizer", _add(always, {"LoRA, optimizer": base.optimizer // 2})),
        Phase("samples", {**always, **decode.peaks["samples"]}),
    ]
    saved = {"window": window.saved["window"], "decode": decode.saved["decode"]}
    shown = [Phase(phase.name, {part: size for part, size in phase.parts.items() if size}) for phase in phases]
    return Estimate(tuple(shown), base, saved, window.lora)


def _step_cache(config: RunConfig, tokens: int) -> dict[str, int]:
    """The tokens' change in the last computed step, of both branches; and, in the graph, of every differentiated one."""
    rollout, plan = config.rollout, config.rollout.plan()
    if rollout.step_cache == "none":
        return {}
    in_graph = rollout.cache_residual == "in-graph" and not plan.stop_input_gradient
    return {"step cache": tokens * (1 + ((plan.count or rollout.sampling_steps) if in_graph else 0))}


def _add(parts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: parts.get(name, 0) + more.get(name, 0) for name in {**parts, **more}}


_COUNTED: dict[str, Any] = {}


def _remembered(name: str, count: Callable[[], T], config: RunConfig, sections: dict[str, Any]) -> T:
    key = json.dumps([name, config.family, sections], sort_keys=True)
    if key not in _COUNTED:
        _COUNTED[key] = count()
    return _COUNTED[key]


def _window(config: RunConfig) -> Counts:
    sections = {
        "model": config.model.model_dump(mode="json", exclude={*DECODE_ONLY, *RESIDENT_ONLY}),
        "lora": config.lora.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json"),
        "batch_size": config.training.batch_size,
    }
    return _remembered("window", lambda: count_window(config), config, sections)


def _decode(config: RunConfig) -> Counts:
    sections = {
        "model": config.model.model_dump(mode="json", exclude={*WINDOW_ONLY, *RESIDENT_ONLY}),
        "reward": config.reward.model_dump(mode="json"),
        "offload": config.rollout.plan().offload_decode,
    }
    return _remembered("decode", lambda: count_decode(config), config, sections)


def _resident(config: RunConfig, lora_numbers: int, gpus: int) -> Resident:
    sections = {
        "model": config.model.model_dump(mode="json", exclude=set(WINDOW_ONLY)),
        "reward": config.reward.model_dump(mode="json"),
        "shared": [lora_numbers, gpus, config.training.zero],
    }
    return _remembered("resident", lambda: resident(config, lora_numbers, gpus), config, sections)


def _encoders(config: RunConfig) -> dict[str, int]:
    sections = {"model": config.model.model_dump(mode="json", exclude={*WINDOW_ONLY, *DECODE_ONLY, *RESIDENT_ONLY})}
    return _remembered("encoders", lambda: family(config.family).encoder_bytes(config.model), config, sections)
