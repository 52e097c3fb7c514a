"""Which steps of a rollout carry gradients, and what of them is recomputed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kind = Literal["last", "random", "spaced", "all"]
Checkpointing = Literal["none", "block", "step", "both"]
Offload = Literal["none", "window", "decode", "both"]
ALLOWED = "last:K (the last K steps), random:K (K drawn steps), spaced:K (K evenly spaced steps, input gradient stopped) or all"


class RolloutSettings(BaseModel):
    """How videos are sampled in training and where gradients run; the section `rollout` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampling_steps: int = Field(30, ge=1, description="steps of the sampler from noise to video")
    backprop: str = Field("last:1", description=f"steps that are differentiated: {ALLOWED}")
    stop_input_gradient: bool | None = Field(
        None,
        description="cut the gradient that runs through a step's network into the steps before it; unset: only for spaced:K",
    )
    checkpointing: Checkpointing = Field(
        "block",
        description="what the backward recomputes: nothing, every block, every step (nothing of a step is kept while the reward is "
        "computed, and its branches of guidance are recomputed one after the other), or both (least memory)",
    )
    offload: Offload = Field(
        "none",
        description="what waits in the CPU's memory for the backward, exactly: what differentiated steps keep (`window`; with checkpointing none "
        "or block), what the decode keeps (`decode`; then the GPU's memory does not depend on the number of frames decoded), or both; with "
        "ZeRO stages 0 to 2",
    )

    step_cache: Literal["none", "teacache"] = Field(
        "none",
        description="teacache: steps of training's rollouts that would change little repeat the effect of the last computed one; held-out "
        "clips are always sampled without",
    )
    cache_threshold: float | None = Field(
        None,
        gt=0,
        description="skip while the estimated change is below this; unset: the default published for the model",
    )
    cache_coefficients: str | None = Field(
        None,
        description="a file of `vcd calibrate`, or a published set by name; unset: the set published for the model",
    )
    cache_mode: Literal["ret", "non-ret"] | None = Field(
        None,
        description="what is compared: `ret` the projected time embedding, the first 5 steps computed; `non-ret` the time embedding itself, "
        "the first and last step computed; unset: ret where the model has it",
    )
    cache_residual: Literal["in-graph", "detached"] = Field(
        "in-graph",
        description="gradient of a skipped step: through the step whose effect it repeats (exact for the cached sampler), or cut there",
    )

    @field_validator("backprop")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_backprop(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RolloutSettings:
        kind, count = parse_backprop(self.backprop)
        if count is not None and count > self.sampling_steps:
            raise ValueError(
                f"rollout.backprop: {self.backprop} wants {count} of only {self.sampling_steps} sampling_steps"
            )
        if kind == "spaced" and self.stop_input_gradient is False:
            raise ValueError("rollout.stop_input_gradient: spaced:K is defined with it; use random:K or last:K without")
        if self.offload in ("window", "both") and self.checkpointing in ("step", "both"):
            raise ValueError(
                f"rollout.offload: {self.offload} moves what steps keep, and with checkpointing {self.checkpointing} that is latents only; "
                "choose checkpointing none or block, or offload none or decode"
            )
        return self

    def plan(self) -> Plan:
        kind, count = parse_backprop(self.backprop)
        stop = kind == "spaced" if self.stop_input_gradient is None else self.stop_input_gradient
        return Plan(kind, count, stop_input_gradient=stop, checkpointing=self.checkpointing, offload=self.offload)


def parse_backprop(text: str) -> tuple[Kind, int | None]:
    """ "last:2" -> ("last", 2), "all" -> ("all", None).

    Raises:
        ValueError: anything but `last:K`, `random:K`, `spaced:K` with K >= 1, and `all`.
    """
    if text == "all":
        return "all", None
    found = re.fullmatch(r"(last|random|spaced):([1-9]\d*)", text)
    if not found:
        raise ValueError(f"rollout.backprop: expected {ALLOWED}, with K >= 1; got {text!r}")
    return found[1], int(found[2])  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which velocities of a rollout x_{i+1} = x_i + dt_i v(x_i) are differentiated.

    The updates themselves are linear and always differentiable, so a chosen step reaches the end of the rollout whatever lies
    between. The velocities of steps that were not chosen are constants.

    - `last:K`: the last K steps (K = 1: the truncation of arXiv 2510.19193 for Open-Sora; DRaFT-K, arXiv 2309.17400).
    - `random:K`: K distinct steps, uniformly drawn. (AlignProp, arXiv 2310.03739, draws the length of a tail instead.)
    - `spaced:K`: every (N // K)-th step from a drawn first one, input gradient stopped (DRTune, arXiv 2405.00760).
    - `all`: every step.

    With `stop_input_gradient` a network never differentiates its input: no products of Jacobians, and every step's gradient can be computed
    alone. For `last:1` it changes nothing.
    """

    kind: Kind = "last"
    count: int | None = 1
    stop_input_gradient: bool = False
    checkpointing: Checkpointing = "block"
    offload: Offload = "none"

    @property
    def draws(self) -> bool:
        """Whether the steps depend on a generator."""
        return self.kind in ("random", "spaced")

    def computed(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Of the differentiated steps those that a step cache may not skip.

        Drawn steps are there for their own gradient. With `stop_input_gradient` each step's gradient is computed alone, where there is no
        earlier step to pass it on to. Otherwise the first: it would repeat the effect of a step without a graph.
        """
        return tuple(chosen if self.draws or self.stop_input_gradient else chosen[:1])

    @property
    def offload_window(self) -> bool:
        return self.offload in ("window", "both")

    @property
    def offload_decode(self) -> bool:
        return self.offload in ("decode", "both")

    @property
    def checkpoint_blocks(self) -> bool:
        return self.checkpointing in ("block", "both")

    @property
    def checkpoint_steps(self) -> bool:
        return self.checkpointing in ("step", "both")

    def steps(self, sampling_steps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """The differentiated steps of `sampling_steps`, ascending.

        `generator` is drawn from for `random` and `spaced`. Under ZeRO-3 every rank must hold one in the same state: ranks have to agree
        on the number of forwards.

        Raises:
            ValueError: more steps wanted than there are, or no generator where one is needed.
        """
        if self.kind == "all":
            return tuple(range(sampling_steps))
        count = self.count or 0
        if not 1 <= count <= sampling_steps:
            raise ValueError(f"{self.kind}:{count}: expected 1 to {sampling_steps} of {sampling_steps} sampling steps")
        if self.kind == "last":
            return tuple(range(sampling_steps - count, sampling_steps))
        if generator is None:
            raise ValueError(f"generator: {self.kind}:{count} draws steps and needs one")
        if self.kind == "random":
            drawn = torch.randperm(sampling_steps, generator=generator, device=generator.device)[:count]
            return tuple(sorted(drawn.tolist()))
        stride = sampling_steps // count
        starts = sampling_steps - (count - 1) * stride
        first = int(torch.randint(starts, (1,), generator=generator, device=generator.device))
        return tuple(range(first, first + (count - 1) * stride + 1, stride))
