"""What the sampler, the trainer and the command line know of a model family, and nothing more.

A family lives in one folder below `vcd_fast.models` (`wan/`, `opensora/`) and implements `Encoder` and `I2VModel`; nothing
family-specific stands outside that folder. Frames are 0-based everywhere: frame 0 is the conditioning image. Tensors that leave a
family are `[batch, frames, channels, height, width]` in [0, 1].
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vcd_fast.models.quantized import Quantization

FAMILIES = {"wan": "vcd_fast.models.wan", "opensora": "vcd_fast.models.opensora"}

Generators = torch.Generator | Sequence[torch.Generator]
C = TypeVar("C", bound="Condition")
Branchwise = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""(branch, latents) -> branch(latents), which a backward may recompute: a branch is a pure function of the latents"""


def family(name: str) -> ModuleType:
    """The package of a model family.

    It exports `ModelSettings` (a subclass of `BaseModelSettings`), `load_encoder(settings) -> Encoder`,
    `load_model(settings) -> I2VModel`, `load_meta(settings) -> I2VModel` (on the meta device, nothing but configurations read),
    `missing_weights(settings) -> list[hub.Missing]`; for counting memory `shaped_model(settings)`, `shaped_condition(model, batch)` (on the
    meta device, in a run's dtypes) and `encoder_bytes(settings)`; `LORA_TARGETS` (named lists of module-name suffixes, one of them "default") and
    `DEFAULT_PRESET` (the preset of its published weights); and, if other tools name its layers otherwise, `comfy_module_name` and its inverse `model_module_name`; and, if the step cache's plan
    is a function of the timesteps, `fill_time_embedding(transformer, settings) -> bool`, which reads that much for a model on the meta
    device.

    Raises:
        ValueError: `name` is no known family.
    """
    if name not in FAMILIES:
        raise ValueError(f"model: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return importlib.import_module(FAMILIES[name])


class BaseModelSettings(BaseModel):
    """What every family lets its user choose; the section `model` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str | None = Field(None, description="folder or hub name of the weights in diffusers layout")
    revision: str | None = Field(None, description="branch, tag or commit of the weights on the hub")
    height: int = Field(gt=0, description="height of the video in pixels")
    width: int = Field(gt=0, description="width of the video in pixels")
    num_frames: int = Field(gt=1, description="frames of a clip, the conditioning image included")
    fps: float = Field(gt=0, description="frames per second written into videos")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of the transformer's weights"
    )
    quantization: Quantization = Field(
        "none",
        description="frozen weights of the transformer's blocks in 8 or 4 bits, where bitsandbytes runs; not with ZeRO stage 3",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the VAE's weights")
    guidance_scale: float = Field(ge=1, description="classifier-free guidance; 1 switches the second branch off")
    guidance_gradient: Literal["both", "conditional"] = Field(
        "both", description="branches of guidance that carry gradients; `conditional` halves the window at a known bias"
    )
    negative_prompt: str = Field("", description="prompt of the unconditional branch")


class Step(NamedTuple):
    """One step of a sampler: x_{i+1} = x_i + dt * v(x_i, timestep)."""

    index: int
    timestep: float
    """what the network is told, in the family's own unit (0..1000 for Wan and Open-Sora)"""
    sigma: float
    """noise level before the step, 1 = pure noise"""
    dt: float
    """signed step size of the Euler update"""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a sampler as plain numbers: no scheduler object, no state."""

    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a clip is generated from, as tensors only, batch first. A family subclasses it and declares the fields.

    A field may be None for a whole batch (a model without image encoder, say). `collate` concatenates along the batch; a family
    whose prompts differ in length overrides it to pad.
    """

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def batch_size(self) -> int:
        return next(iter(self._tensors().values())).shape[0]

    def to(self: C, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> C:
        """Move every tensor to `device`; floating-point ones also to `dtype`."""
        moved = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in self._tensors().items()
        }
        return dataclasses.replace(self, **moved)

    @classmethod
    def collate(cls: type[C], items: Sequence[C]) -> C:
        """One batch out of several conditions, in order.

        Raises:
            ValueError: no items, or items that have different fields or shapes.
        """
        if not items:
            raise ValueError("items: expected at least one condition, got none")
        fields = {}
        for field in dataclasses.fields(cls):
            values = [getattr(item, field.name) for item in items]
            missing = [value is None for value in values]
            if all(missing):
                fields[field.name] = None
                continue
            shapes = {None if value is None else tuple(value.shape[1:]) for value in values}
            if any(missing) or len(shapes) > 1:
                raise ValueError(f"items: expected equal shapes of {field.name}, got {sorted(map(str, shapes))}")
            fields[field.name] = torch.cat(values)
        return cls(**fields)

    def split(self: C) -> list[C]:
        """The inverse of `collate`: conditions of batch size one."""
        return [
            dataclasses.replace(self, **{name: value[i : i + 1] for name, value in self._tensors().items()})
            for i in range(self.batch_size)
        ]

    def save(self, path: str | Path) -> None:
        try:
            save_file({name: value.contiguous() for name, value in self._tensors().items()}, path)
        except SafetensorError as error:  # what a full disk is reported as
            raise OSError(f"{path} could not be written: {error}") from error

    @classmethod
    def load(cls: type[C], path: str | Path) -> C:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        names = {field.name for field in dataclasses.fields(cls)}
        if not set(found) <= names:
            raise ValueError(f"{path}: expected the tensors of a {cls.__name__}, got {sorted(found)}")
        return cls(**{name: found.get(name) for name in names})


@dataclasses.dataclass(frozen=True)
class State:
    """Where a rollout stands. A family that needs more (masks, a reference to restore) subclasses it."""

    latents: Tensor
    """[B, C, f, h, w] float32"""


class Encoder(Protocol):
    """Text, image and VAE encoders: loaded, used once per sample, dropped.

    Making one is cheap, and `fingerprint` is known without the weights in memory: they are loaded by `encode`, which the
    cache of encodings does not call when it has everything.
    """

    condition_type: type[Condition]
    """what `encode` returns and `condition_type.load` reads back"""
    fingerprint: str
    """names weights and version, so that results cached on disk are never mixed up"""

    def encode(
        self,
        images: Tensor,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        height: int,
        width: int,
        num_frames: int,
        generator: Generators | None = None,
    ) -> Condition:
        """images [B, 3, H, W] float32 in [0, 1], already of the clip's size -> Condition of batch size B on the CPU."""
        ...


class I2VModel(Protocol):
    """A transformer that is tuned and everything between noise and pixels around it."""

    family: str
    """a key of `FAMILIES`"""
    transformer: nn.Module
    vae: nn.Module
    """frozen; what `decode` runs"""
    settings: BaseModelSettings
    lora_targets: Mapping[str, Sequence[str]]
    """the family's `LORA_TARGETS`"""

    @property
    def blocks(self) -> nn.ModuleList:
        """the transformer's blocks, in order"""
        ...

    def block_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        """Within it, a forward of `transformer` that builds a graph keeps only the input of every block and recomputes
        the block in the backward (`use_reentrant=False`), or does not, whatever was set before."""
        ...

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str) -> I2VModel: ...

    def schedule(self, sampling_steps: int, height: int, width: int, num_frames: int) -> Schedule: ...

    def initial(self, condition: Condition, generator: Generators) -> State:
        """Noise for a batch; one generator per sample makes a sample independent of its batch."""
        ...

    def velocity(
        self,
        state: State,
        step: Step,
        condition: Condition,
        forward: Callable[..., object] | None = None,
        branchwise: Branchwise | None = None,
    ) -> Tensor:
        """dx/dt in float32, shape of `state.latents`, guidance combined. `forward` stands in for `self.transformer`
        (the training engine's wrapper); what it is called with must not depend on which it is. `branchwise` calls every branch of
        guidance that is a forward of its own, where given."""
        ...

    def advance(self, state: State, velocity: Tensor, step: Step) -> State:
        """The Euler update and the family's own rule around it."""
        ...

    def decode(self, latents: Tensor, frames: Sequence[int] | None = None, *, checkpoint: bool = True) -> Tensor:
        """latents [B, C, f, h, w] of the last step -> [B, T, 3, H, W] in [0, 1], only what `frames` (0-based, ascending; None:
        all) need. Differentiable with respect to `latents`."""
        ...
