"""LoRA on a transformer, through PEFT: what is trained, saved and switched off."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vcd_fast.models.base import I2VModel
from vcd_fast.models.lora_files import LoRAWeights, export_lora, read_lora, write_lora

__all__ = [
    "LoRASettings",
    "add_lora",
    "export_lora",
    "load_lora",
    "lora_disabled",
    "lora_parameters",
    "lora_state_dict",
    "lora_weights",
    "save_lora",
    "set_lora_scale",
]

ADAPTER = "default"


class LoRASettings(BaseModel):
    """What is trained; the section `lora` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(32, ge=1, description="rank of the update of every target")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: str | list[str] = Field(
        "default",
        description="layers that get an update: a named set of the model family (`default`), or a list of suffixes of module names",
    )
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="how A starts: PEFT's default, or normal with standard deviation 1 / rank; B starts at zero",
    )


def add_lora(model: I2VModel, settings: LoRASettings, seed: int) -> dict[str, nn.Parameter]:
    """Freeze the transformer and add a LoRA in float32 to it; returns its parameters as `lora_parameters` does.

    The initial weights are a function of `seed` and the module's name alone, and the global generators are left as they were.

    Raises:
        ValueError: an unknown set of targets, a target that names no linear layer, or a transformer that has a LoRA already.
    """
    targets = _resolve_targets(model, settings.targets)
    config = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets, "lora_dropout": 0.0}
    layers = _inject(model.transformer, config)
    for name, layer in layers.items():
        generator = torch.Generator().manual_seed(_mixed(seed, name))
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if settings.init == "gaussian":
            start = torch.randn(a.shape, generator=generator) / settings.rank
        else:
            bound = 1 / math.sqrt(a.shape[1])  # kaiming_uniform_ with a = sqrt(5), as nn.Linear and PEFT
            start = torch.rand(a.shape, generator=generator) * (2 * bound) - bound
        with torch.no_grad():
            a.copy_(start)
            b.zero_()
    return lora_parameters(model)


def load_lora(model: I2VModel, path: str | os.PathLike[str], scale: float = 1.0) -> LoRAWeights:
    """Put the LoRA at `path` (diffusers, peft or comfy format) on the transformer, or its values into the one that is there.

    Args:
        scale: multiplies its effect; 0 is the base model.

    Raises:
        FileNotFoundError, ValueError: no LoRA, one for another model (the message names modules), or one that differs in modules, rank or
            alpha from what is there.
    """
    weights = read_lora(path, model.family)
    transformer = model.transformer
    _check_fits(transformer, weights, path)
    layers = _layers(transformer)
    if not layers:
        layers = _inject(transformer, {**weights.config(), "target_modules": weights.modules})
        _keep_description(transformer, weights)
    there = {name: (layer.r[ADAPTER], float(layer.lora_alpha[ADAPTER])) for name, layer in layers.items()}
    wanted = {module: (weights.rank(module), weights.alpha[module]) for module in weights.modules}
    if there != wanted:
        differing = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        name = differing[0]
        raise ValueError(
            f"lora: {path} does not fit the LoRA on the model: {len(differing)} modules differ, the first is {name} "
            f"with (rank, alpha) {wanted.get(name)} in the file and {there.get(name)} on the model"
        )
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(weights.tensors[name])
    set_lora_scale(model, scale)
    return weights


def lora_parameters(model: I2VModel) -> dict[str, nn.Parameter]:
    """The LoRA's float32 parameters by `<module>.lora_A.weight` and `<module>.lora_B.weight`, in the order of the names."""
    return {
        f"{name}.{suffix}.weight": part[ADAPTER].weight
        for name, layer in sorted(_layers(model.transformer).items())
        for part, suffix in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B"))
    }


def lora_state_dict(model: I2VModel) -> dict[str, Tensor]:
    """Copies of `lora_parameters` on the CPU. Under ZeRO-3 call it with the parameters gathered."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in lora_parameters(model).items()}


def lora_weights(model: I2VModel, state: Mapping[str, Tensor] | None = None) -> LoRAWeights:
    """The LoRA as `write_lora` takes it; `state` stands in for `lora_state_dict(model)`, gathered by a training engine."""
    layers = _layers(model.transformer)
    if not layers:
        raise ValueError("lora: the transformer has none; add or load one first")
    return LoRAWeights(
        lora_state_dict(model) if state is None else dict(state),
        {name: float(layer.lora_alpha[ADAPTER]) for name, layer in layers.items()},
        model.family,
        tuple(sorted(model.transformer.peft_config[ADAPTER].target_modules)),
    )


def save_lora(model: I2VModel, path: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None) -> Path:
    """Write the LoRA in diffusers format, with the metadata that tells alpha; returns the file.

    Args:
        path: a folder, or a file name that ends in `.safetensors`.
        state: stands in for `lora_state_dict(model)`, gathered by a training engine.

    Raises:
        ValueError: there is no LoRA.
        OSError: the file cannot be written; nothing half-written is left.
    """
    return write_lora(path, lora_weights(model, state))


def set_lora_scale(model: I2VModel, scale: float) -> None:
    """Multiply the LoRA's effect by `scale`: of the original, not of the last one set. 0 is the base model."""
    for layer in _layers(model.transformer).values():
        layer.set_scale(ADAPTER, scale)


@contextmanager
def lora_disabled(model: I2VModel) -> Iterator[None]:
    """The base model, for forwards inside; nothing happens if there is no LoRA."""
    layers = _layers(model.transformer).values()
    wanted = [(parameter, parameter.requires_grad) for parameter in lora_parameters(model).values()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def _resolve_targets(model: I2VModel, targets: str | Sequence[str]) -> list[str]:
    if isinstance(targets, str):
        if targets not in model.lora_targets:
            raise ValueError(
                f"lora.targets: expected a list of module names or one of {', '.join(sorted(model.lora_targets))}, got {targets!r}"
            )
        targets = model.lora_targets[targets]
    linear = [name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)]
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if missing or not targets:
        examples = ", ".join(sorted({name.split(".", 2)[-1] for name in linear if name.startswith("blocks.")})[:12])
        raise ValueError(
            f"lora.targets: no linear layer ends in {', '.join(missing) or 'nothing'}; there are {examples}"
        )
    return list(targets)


def _inject(transformer: nn.Module, config: dict) -> dict[str, nn.Module]:
    from peft import LoraConfig, inject_adapter_in_model

    if _layers(transformer):
        raise ValueError("lora: the transformer has a LoRA already")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        if hasattr(transformer, "add_adapter"):  # diffusers keeps track of adapters
            transformer.add_adapter(LoraConfig(**config), adapter_name=ADAPTER)
        else:
            inject_adapter_in_model(LoraConfig(**config), transformer, ADAPTER)
    layers = _layers(transformer)
    for layer in layers.values():
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].weight.data = part[ADAPTER].weight.data.float()
            part[ADAPTER].weight.requires_grad_(True)
    return layers


def _check_fits(transformer: nn.Module, weights: LoRAWeights, path: str | os.PathLike[str]) -> None:
    """Before anything is changed."""
    layers = _layers(transformer)
    linear = {
        name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear) or name in layers
    }
    unknown = [module for module in weights.modules if module not in linear]
    if unknown:
        raise ValueError(f"lora: {path} is for another model; there is no linear layer {', '.join(unknown[:3])}")
    for module in weights.modules:
        found = (
            weights.tensors[f"{module}.lora_B.weight"].shape[0],
            weights.tensors[f"{module}.lora_A.weight"].shape[1],
        )
        expected = (linear[module].out_features, linear[module].in_features)
        if found != expected:
            raise ValueError(
                f"lora: {path} is for another model: its {module} is {found[0]} x {found[1]}, the model's {expected[0]} x {expected[1]}"
            )


def _keep_description(transformer: nn.Module, weights: LoRAWeights) -> None:
    """Let a LoRA that is saved again name its targets as the file did."""
    if weights.targets:
        transformer.peft_config[ADAPTER].target_modules = set(weights.targets)


def _layers(transformer: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }


def _mixed(seed: int, name: str) -> int:
    return (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % (1 << 63)
