"""What a differentiated step of Open-Sora keeps for its backward, counted on the meta device: no weights, no GPU, seconds.

    python tools/opensora_memory.py [--height 276 --width 368 --frames 51] [--json]

Counted are the bytes of distinct tensors that autograd saves, parameters apart. Attention is taken to keep what flash and
memory-efficient kernels keep (query, key, value, output, one number per row). Weights in bfloat16, LoRA of rank 16 in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vcd_fast.frozen_conv import freeze_convolutions
from vcd_fast.models.opensora.targets import LORA_TARGETS
from vcd_fast.models.opensora.transformer import STDiT3
from vcd_fast.models.opensora.vae import SPATIAL_FACTOR, OpenSoraVAE, chunks, latent_frames

GIB = 2**30


class _FlashAttention(torch.autograd.Function):
    """The tensors such a kernel keeps; on the meta device there is nothing to compute."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


class Kept:
    """Distinct storages, by bytes; those of `apart` do not count."""

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._apart:
            self._storages[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    @property
    def gib(self) -> float:
        return sum(storage.nbytes() for storage in self._storages.values()) / GIB

    @contextmanager
    def saving(self) -> Iterator[Kept]:
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield self


def _transformer(depth: int) -> STDiT3:
    with torch.device("meta"):
        model = nn.Module.to(STDiT3(depth=depth), torch.bfloat16)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=16, lora_alpha=8, target_modules=LORA_TARGETS["default"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def _forward(model: STDiT3, batch: int, height: int, width: int, frames: int) -> None:
    size = (latent_frames(frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
    with torch.device("meta"):
        model(
            hidden_states=torch.empty(batch, 4, *size),
            timestep=torch.empty(batch),
            encoder_hidden_states=torch.empty(batch, 40, 4096, dtype=torch.bfloat16),
            frame_mask=torch.empty(batch, size[0], dtype=torch.bool),
            height=height,
            width=width,
            fps=24,
        )


def step(batch: int, height: int, width: int, frames: int) -> dict[str, float]:
    """GiB that one forward of XL/2 keeps: without checkpointing; with it, and the block that a backward holds besides."""
    attention = mock.patch("vcd_fast.models.opensora.attention._sdpa", _flash)
    with attention:
        model = _transformer(depth=28)
        kept = Kept(model.parameters())

        def recorded(block: nn.Module, *arguments: Any) -> Tensor:
            for argument in _tensors(arguments):
                kept.add(argument)
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)

        model.enable_gradient_checkpointing(recorded)
        with kept.saving():
            _forward(model, batch, height, width, frames)

        whole = {}
        for depth in (1, 2):
            small = _transformer(depth)
            with Kept(small.parameters()).saving() as plain:
                _forward(small, batch, height, width, frames)
            whole[depth] = plain.gib
    pair = whole[2] - whole[1]
    return {
        "no checkpointing": whole[1] + 27 * pair,
        "block checkpointing": kept.gib,
        "one block": pair / 2,
    }


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return _FlashAttention.apply(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def decode(
    dtype: torch.dtype, frozen_conv: bool, height: int, width: int, frames: int, wanted: list[int]
) -> dict[str, float]:
    """GiB that decoding keeps: one chunk, one frame, and the frames `wanted` with and without checkpointing."""
    with torch.device("meta"):
        vae = nn.Module.to(OpenSoraVAE(), dtype).requires_grad_(False)
    if frozen_conv:
        freeze_convolutions(vae)
    size = (height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)

    def count(work: Callable[[Tensor], object], *shape: int) -> float:
        latents = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        with Kept([*vae.parameters(), *vae.buffers()]).saving() as kept:
            work(latents)
        return kept.gib

    first = chunks(frames)[0]
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_of_the_vae):
        return {
            "one chunk": count(lambda z: vae.temporal_vae.decode(z, first.frames), 1, 4, first.latents, *size),
            "one frame": count(vae._decode_image, 1, 4, *size),
            "frames, not checkpointed": count(
                lambda z: vae.decode(z, frames, wanted, checkpoint=False), 1, 4, latent_frames(frames), *size
            ),
        }


def _flash_of_the_vae(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FlashAttention.apply(query, key, value)


def measure(height: int = 276, width: int = 368, frames: int = 51) -> dict[str, Any]:
    """Every count, in GiB."""
    wanted = [f for f in (1, 18, 35, frames - 1) if f < frames]
    return {
        "size": [height, width, frames],
        "step, both branches of guidance in one forward": step(2, height, width, frames),
        "step, one branch": step(1, height, width, frames),
        **{
            f"decode of frames {wanted}, {str(dtype).removeprefix('torch.')}, frozen_conv={frozen}": decode(
                dtype, frozen, height, width, frames, wanted
            )
            for dtype in (torch.bfloat16, torch.float32)
            for frozen in (False, True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("height", 276), ("width", 368), ("frames", 51)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    counts = measure(arguments.height, arguments.width, arguments.frames)
    if arguments.json:
        print(json.dumps(counts, indent=1))
        return
    print(f"GiB kept for the backward, {arguments.frames} frames of {arguments.height}x{arguments.width}")
    for title, values in counts.items():
        if isinstance(values, dict):
            print(f"\n{title}")
            for name, value in values.items():
                print(f"  {name:28s} {value:8.2f}")


if __name__ == "__main__":
    main()
