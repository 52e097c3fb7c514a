"""The section `training` of a run's configuration, and the whole of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vcd_fast.data import DataSettings
from vcd_fast.models.base import BaseModelSettings
from vcd_fast.models.lora import LoRASettings
from vcd_fast.rewards.vcd import VCDRewardSettings
from vcd_fast.rollout.plan import RolloutSettings

SECTIONS = ("model", "lora", "rollout", "reward", "data", "training")


class TrainingSettings(BaseModel):
    """How long, how fast, on how many devices, and what is written on the way.

    The defaults are the paper's where it states them: AdamW at a constant 2e-4, gradients clipped at norm 1 for Open-Sora. It does
    not state betas, weight decay or batch size; PyTorch's betas, no weight decay and one clip per device are used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field("runs/run", description="folder of the run: log, checkpoints, samples, LoRA")
    resume: str = Field(
        "auto", description="auto: go on from the newest checkpoint in --output; never; or a checkpoint's folder"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to train; auto takes a GPU if there is one"
    )
    seed: int = Field(
        0, ge=0, description="every random number of the run is a function of this, the step and the sample"
    )

    max_train_steps: int = Field(800, gt=0, description="optimizer steps")
    batch_size: int = Field(1, gt=0, description="clips per device and backward pass")
    gradient_accumulation: int = Field(1, gt=0, description="backward passes per optimizer step")
    learning_rate: float = Field(2e-4, gt=0, description="AdamW's learning rate")
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the learning rate rises linearly; constant afterwards"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's norm at this; 0 switches clipping off")
    max_bad_steps: int = Field(
        5, gt=0, description="stop after this many steps in a row with a non-finite reward or gradient"
    )
    zero: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")

    checkpoint_every: int = Field(100, ge=0, description="optimizer steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints that are kept")
    sample_every: int = Field(
        100, ge=0, description="optimizer steps between samples and held-out rewards; 0: none on the way"
    )
    sample_seeds: int = Field(1, gt=0, description="noises per held-out picture")
    sample_pictures: int = Field(4, gt=0, description="held-out pictures that are sampled")
    overfit: bool = Field(
        False, description="train on one picture with one noise, to see that the gradient does its work"
    )
    tensorboard: bool = Field(False, description="write TensorBoard events beside the JSONL log")
    cache: str | None = Field(None, description="folder of the encoded prompts and pictures; default: OUTPUT/encodings")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on, section by section."""

    family: str
    preset: str | None
    model: BaseModelSettings
    lora: LoRASettings
    rollout: RolloutSettings
    reward: VCDRewardSettings
    data: DataSettings
    training: TrainingSettings

    def as_dict(self) -> dict[str, Any]:
        sections = {name: getattr(self, name).model_dump(mode="json") for name in SECTIONS}
        return {"family": self.family, "preset": self.preset, **sections}
