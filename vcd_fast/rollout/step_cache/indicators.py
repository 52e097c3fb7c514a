"""What the step cache compares from one step to the next: the modulation of a transformer's first block, read ahead of the blocks.

One class per family of transformers, found by the transformer's class, so that a stock diffusers pipeline is served like our adapters.
All are computed in float32: bfloat16 would add 2^-9 to distances of 0.01 to 0.05.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["ret", "non-ret"]


class Indicator(Protocol):
    timestep_only: bool
    """whether the indicator is a function of the timestep alone; the plan is then known before the first step"""
    blocks: Sequence[nn.Module]
    """the transformer's blocks in the order in which tokens pass them; each takes them as its first argument and returns them alone"""

    def __call__(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """float32, from the arguments of a forward of `transformer`, by name."""
        ...


def indicator_for(transformer: nn.Module, mode: Mode) -> Indicator:
    """The indicator of a transformer.

    Raises:
        ValueError: a transformer of no known class.
    """
    name = type(transformer).__name__
    if name not in INDICATORS:
        raise ValueError(f"transformer: the step cache knows {' and '.join(INDICATORS)}, got {name}")
    return INDICATORS[name](transformer, mode)


def named_arguments(transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def relative_distance(current: Tensor, previous: Tensor) -> float:
    """mean|current - previous| / mean|previous|."""
    return float((current - previous).abs().mean() / previous.abs().mean())


class WanIndicator:
    """Wan's time embedding (`non-ret`), or its projection to the six rows that modulate a block (`ret`).

    It depends on the timestep alone: decisions are the same for all prompts, branches and ranks.
    """

    timestep_only = True

    def __init__(self, transformer: nn.Module, mode: Mode) -> None:
        self.mode = mode
        self.blocks = list(transformer.blocks)

    def __call__(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        timestep = arguments["timestep"]
        if timestep.ndim != 1 or bool((timestep != timestep[0]).any()):
            raise ValueError("timestep: the step cache expects one timestep for the whole batch, got several")
        return self.at(transformer, float(timestep[0]))

    @torch.no_grad()
    def at(self, transformer: nn.Module, timestep: float) -> Tensor:
        """[1, C] or [1, 6 C] at a timestep. Reads nothing of the transformer but its time embedding."""
        embedder = transformer.condition_embedder
        weight = embedder.time_embedder.linear_1.weight
        with torch.autocast(weight.device.type, enabled=False):
            time = embedder.timesteps_proj(torch.tensor([timestep], dtype=torch.float32, device=weight.device))
            embedding = embedder.time_embedder(time.to(weight.dtype)).float()
            if self.mode == "non-ret":
                return embedding
            projection = embedder.time_proj
            return F.linear(F.silu(embedding), projection.weight.float(), projection.bias.float())


class OpenSoraIndicator:
    """The modulated tokens that enter the first spatial block of Open-Sora's transformer; they depend on the latents.

    As in the published rule, all frames are modulated with the time of those that are generated.
    """

    timestep_only = False

    def __init__(self, transformer: nn.Module, mode: Mode) -> None:
        pairs = zip(transformer.spatial_blocks, transformer.temporal_blocks, strict=True)
        self.blocks = [block for pair in pairs for block in pair]
        # A copy: under ZeRO-3 a block's own parameters are only there while the block runs, and these are frozen.
        self._rows = self.blocks[0].scale_shift_table.detach()[:2].float().clone()

    @torch.no_grad()
    def __call__(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        from vcd_fast.models.opensora.blocks import modulated_norm
        from vcd_fast.models.opensora.embeddings import position_table

        latents, timestep, fps = (arguments[name] for name in ("hidden_states", "timestep", "fps"))
        rows, columns = (math.ceil(s / p) for s, p in zip(latents.shape[3:], transformer.patch_size[1:], strict=True))
        with torch.autocast(latents.device.type, enabled=False):
            dtype = transformer.x_embedder.proj.weight.dtype
            tokens = transformer.x_embedder(latents.to(dtype)).float()
            scale = math.sqrt(arguments["height"] * arguments["width"]) / transformer.config.input_sq_size
            tokens = tokens + position_table(rows, columns, tokens.shape[-1], scale, latents.device)
            if not isinstance(fps, Tensor):
                fps = torch.full((len(latents),), float(fps), device=latents.device)
            time = transformer.t_embedder(timestep) + transformer.fps_embedder(fps)
            table = transformer.t_block(time).unflatten(-1, (6, -1))[:, :2].float()
            shift, scale = (self._rows.to(latents.device) + table)[:, :, None, None].unbind(1)
            return modulated_norm(tokens, shift, scale)


INDICATORS = {"WanTransformer3DModel": WanIndicator, "STDiT3": OpenSoraIndicator}
