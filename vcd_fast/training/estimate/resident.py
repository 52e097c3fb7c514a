"""What is in memory all through a step: weights, the LoRA, its gradients and the optimizer, on one of several GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import Tensor, nn

from vcd_fast.models.base import I2VModel, family
from vcd_fast.training.estimate.reward import CountedReward
from vcd_fast.training.settings import RunConfig

LIVE_PARAMETERS = 10**9
"""numbers that DeepSpeed keeps gathered at most under ZeRO-3 (`stage3_max_live_parameters`)"""
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""bytes per weight; those of nf4 with a scale of 8 bits per 64 weights, and one of 32 for 256 of these"""
WIDTH = 4
"""bytes per number of the LoRA, its gradients and AdamW's two moments: float32"""


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes on one GPU."""

    transformer: int
    vae: int
    reward: int
    lora: int
    gradients: int
    optimizer: int
    gathered: int = 0
    """weights of other ranks that a forward or backward holds (ZeRO-3)"""
    restored: int = 0
    """the largest quantized layer as it is computed with"""
    unsharded: int = 0
    """the transformer as it is loaded"""

    def parts(self) -> dict[str, int]:
        return {
            "weights": self.transformer + self.vae + self.reward,
            "LoRA, optimizer": self.lora + self.gradients + self.optimizer,
        }


def resident(config: RunConfig, lora_numbers: int, gpus: int) -> Resident:
    """Stage 0 and 1 replicate weights, LoRA and gradients, stage 2 shards gradients, stage 3 the frozen weights as well; all but 0 shard
    the optimizer and keep a float32 copy of the LoRA in it, and a bucket for the gradients as large as the LoRA (`engine.build`)."""
    model = family(config.family).shaped_model(config.model)
    transformer = [*model.transformer.parameters(), *model.transformer.buffers()]
    saved, restored = _quantized(config, model)
    frozen, numbers = _bytes(transformer) - saved, sum(tensor.numel() for tensor in transformer)
    zero, one = config.training.zero, WIDTH * lora_numbers
    shared, bucket = one // gpus, one if zero else 0
    gathered = 0
    if zero == 3 and gpus > 1:
        gathered = min(frozen, LIVE_PARAMETERS * frozen // numbers) + max(map(_module_bytes, model.blocks))
    return Resident(
        transformer=frozen // gpus if zero == 3 else frozen,
        vae=_module_bytes(model.vae),
        reward=_reward_bytes(config),
        lora=shared if zero == 3 else one,
        gradients=(shared if zero >= 2 else one) + bucket,
        optimizer=3 * shared if zero else 2 * one,
        gathered=gathered,
        restored=restored,
        unsharded=frozen,
    )


def _quantized(config: RunConfig, model: I2VModel) -> tuple[int, int]:
    """Bytes that quantization saves, and those of the largest layer in the dtype it computes in (`quantize_linears`)."""
    kind = config.model.quantization
    layers = [m.weight for block in model.blocks for m in block.modules() if type(m) is nn.Linear]
    if kind == "none" or not layers:
        return 0, 0
    saved = sum(weight.nbytes - round(QUANTIZED[kind] * weight.numel()) for weight in layers)
    return saved, max(weight.nbytes for weight in layers)


def _reward_bytes(config: RunConfig) -> int:
    reward = CountedReward(config.reward)
    return _bytes(reward.weights) + WIDTH * reward.directions


def _module_bytes(module: nn.Module) -> int:
    return _bytes([*module.parameters(), *module.buffers()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
