"""LoRA and AdamW's moments out of an engine and back, whole, whatever the ZeRO stage and the number of ranks.

A checkpoint made of whole tensors resumes on another number of devices or at another stage, and can be stored as safetensors.
Every function here is collective: all ranks call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
Parameters = Mapping[str, nn.Parameter]


def gather_parameters(engine: deepspeed.DeepSpeedEngine, parameters: Parameters) -> dict[str, Tensor]:
    """Whole float32 copies of the trained parameters on the CPU, by name."""
    if engine.zero_optimization_stage() == 0:
        return {name: p.detach().float().cpu().clone() for name, p in parameters.items()}
    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in parameters.items()}


def gather_moments(engine: deepspeed.DeepSpeedEngine, parameters: Parameters) -> dict[str, Tensor]:
    """Whole copies of AdamW's moments on the CPU: `exp_avg.NAME`, `exp_avg_sq.NAME`. Empty before the first step."""
    optimizer = _inner_optimizer(engine)
    if not optimizer.state:
        return {}
    found = {}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            if engine.zero_optimization_stage() == 0:
                value = optimizer.state[parameter][moment]
            else:
                value = safe_get_full_optimizer_state(parameter, moment)
            found[f"{moment}.{name}"] = value.detach().cpu().clone().view(_whole_shape(parameter))
    return found


def restore_moments(
    engine: deepspeed.DeepSpeedEngine, parameters: Parameters, moments: Mapping[str, Tensor], updates: int
) -> None:
    """Put gathered moments back into a fresh engine whose parameters already have their values.

    Args:
        updates: optimizer updates the moments stand for; AdamW corrects its bias by it.
    """
    if not moments:
        return
    stage = engine.zero_optimization_stage()
    _create_state(engine, parameters)
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            value = moments[f"{moment}.{name}"].to(engine.device)
            if stage == 0:
                _inner_optimizer(engine).state[parameter][moment].copy_(value)
            elif stage == 3:
                _set_shard(parameter, moment, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
    for state in _inner_optimizer(engine).state.values():
        state["step"].fill_(updates)


def discard_gradients(engine: deepspeed.DeepSpeedEngine, parameters: Parameters) -> None:
    """Throw away what earlier backward passes of this optimizer step have accumulated.

    ZeRO keeps gradients where only its own step clears them, and it discards a step whose gradient is not finite: it is given one.
    """
    with whole_parameters(engine, parameters):
        engine.backward(sum((p * float("nan")).sum() for p in parameters.values()), scale_wrt_gas=False)
    engine.step()


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    for group in _inner_optimizer(engine).param_groups:
        group["lr"] = learning_rate


@contextlib.contextmanager
def whole_parameters(engine: deepspeed.DeepSpeedEngine, parameters: Parameters) -> Iterator[None]:
    """Inside, every parameter can be read whole (ZeRO-3 shards them otherwise)."""
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        yield


def _create_state(engine: deepspeed.DeepSpeedEngine, parameters: Parameters) -> None:
    """Make the optimizer allocate its state, which it does on its first update, by an update that changes nothing."""
    rates = [group["lr"] for group in _inner_optimizer(engine).param_groups]
    set_learning_rate(engine, 0.0)
    with whole_parameters(engine, parameters):
        engine.backward(sum((p * 0).sum() for p in parameters.values()), scale_wrt_gas=False)
    engine.step()
    for group, rate in zip(_inner_optimizer(engine).param_groups, rates, strict=True):
        group["lr"] = rate


def _set_shard(parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    """ZeRO-3's own setter refuses tensors whose size the ranks do not divide; the shards are padded, so pad as they are."""
    length = safe_get_local_optimizer_state(parameter, moment).numel()
    rank, world = dist.get_rank(), dist.get_world_size()
    padded = nn.functional.pad(value.flatten(), (0, length * world - value.numel()))
    safe_set_local_optimizer_state(parameter, padded[rank * length : (rank + 1) * length], moment)


def _inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() > 0 else engine.optimizer


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
