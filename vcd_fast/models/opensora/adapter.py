"""Open-Sora 1.2 image-to-video as the sampler sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from vcd_fast.frozen_conv import freeze_convolutions
from vcd_fast.models.autocast import without_autocast
from vcd_fast.models.base import Branchwise, Generators, Schedule, Step
from vcd_fast.models.checkpointing import block_checkpointing
from vcd_fast.models.noise import draw_noise
from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.condition import OpenSoraCondition, padded_texts
from vcd_fast.models.opensora.conditioning import parse_strategy, place
from vcd_fast.models.opensora.files import TRANSFORMER_PART, VAE_PART, resolve
from vcd_fast.models.opensora.loading import load_transformer, load_vae
from vcd_fast.models.opensora.schedule import OpenSoraState, active_frames, advanced, flow_schedule, network_input
from vcd_fast.models.opensora.settings import TINY, ModelSettings
from vcd_fast.models.opensora.targets import LORA_TARGETS
from vcd_fast.models.opensora.transformer import STDiT3
from vcd_fast.models.opensora.vae import SPATIAL_FACTOR, OpenSoraVAE, latent_frames
from vcd_fast.models.quantized import quantize_linears
from vcd_fast.models.random_weights import warn_random

Forward = Callable[..., object]


def load_model(settings: ModelSettings, device: torch.device | str = "cpu") -> OpenSoraI2V:
    """The transformer and the VAE's decoder, frozen.

    Raises:
        ValueError, OSError: weights that are not there, or not those of Open-Sora 1.2.
    """
    dtype, vae_dtype = getattr(torch, settings.dtype), getattr(torch, settings.vae_dtype)
    if settings.weights == TINY:
        warn_random(f"model.weights={TINY}")
        transformer, vae = tiny.tiny_transformer(dtype), tiny.tiny_vae(vae_dtype)
    else:
        folders = [resolve(settings, part) for part in (TRANSFORMER_PART, VAE_PART)]
        transformer, vae = load_transformer(folders[0], dtype), load_vae(folders[1], vae_dtype)
    blocks = [*transformer.spatial_blocks, *transformer.temporal_blocks]
    quantize_linears(blocks, settings.quantization, dtype, device)
    return OpenSoraI2V(transformer, vae, settings).to(device)


class OpenSoraI2V:
    """Implements `vcd_fast.models.base.I2VModel`; see there for what the methods promise."""

    family = "opensora"
    lora_targets = LORA_TARGETS

    def __init__(self, transformer: STDiT3, vae: OpenSoraVAE, settings: ModelSettings) -> None:
        self.settings = settings
        self.transformer = transformer.eval().requires_grad_(False)
        self.transformer.set_attention_backend(settings.attention_backend)
        self.vae = vae.eval().requires_grad_(False)
        vae.drop_encoders()  # pictures are encoded by OpenSoraEncoder
        if settings.frozen_conv:
            freeze_convolutions(self.vae)
        self._placements = parse_strategy(settings.mask_strategy)

    @property
    def blocks(self) -> nn.ModuleList:
        pairs = zip(self.transformer.spatial_blocks, self.transformer.temporal_blocks, strict=True)
        return nn.ModuleList(block for pair in pairs for block in pair)

    @property
    def device(self) -> torch.device:
        return self.vae.scale.device

    def to(self, device: torch.device | str) -> OpenSoraI2V:
        """Move the weights; dtypes stay."""
        self.transformer.to(device)
        self.vae.to(device)
        return self

    def block_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return block_checkpointing(self.transformer, enabled)

    def reference(self, images: Tensor) -> Tensor:
        """What decoded frames are compared with: images [..., H, W] of the clip's size without the rows at the bottom and the columns at
        the right that the VAE does not decode. Pixels stay where they are, which resizing would not do."""
        height, width = self.settings.decoded_size
        return images[..., :height, :width]

    def schedule(self, sampling_steps: int, height: int, width: int, num_frames: int) -> Schedule:
        return flow_schedule(sampling_steps, height, width, num_frames)

    def initial(self, condition: OpenSoraCondition, generator: Generators) -> OpenSoraState:
        """Noise with the image's latent where `settings.mask_strategy` places it.

        Raises:
            ValueError: not as many generators as samples, or a condition that was encoded at another size.
        """
        image = condition.image_latents
        batch, channels = image.shape[:2]
        size = tuple(side // SPATIAL_FACTOR for side in self.settings.decoded_size)
        if tuple(image.shape[2:]) != (1, *size):
            raise ValueError(
                f"condition: expected image latents [B, {channels}, 1, {size[0]}, {size[1]}] for a video of "
                f"{self.settings.height}x{self.settings.width}, got {list(image.shape)}"
            )
        frames = latent_frames(self.settings.num_frames)
        draw = partial(draw_noise, (channels, frames, *size), batch, generator)
        latents, edit = place(draw().to(image.device), [image.float()], self._placements)
        fractional = any(0 < placement.edit < 1 for placement in self._placements)
        return OpenSoraState(latents, edit, edit == 1, draw().to(image.device) if fractional else None)

    def velocity(
        self,
        state: OpenSoraState,
        step: Step,
        condition: OpenSoraCondition,
        forward: Forward | None = None,
        branchwise: Branchwise | None = None,
    ) -> Tensor:
        def branch(name: str, text: Tensor, mask: Tensor | None) -> Tensor:
            def run(latents: Tensor) -> Tensor:
                at = dataclasses.replace(state, latents=latents)
                return self._forward(name, at, step, text, mask, forward or self.transformer)

            return run(state.latents) if branchwise is None else branchwise(run, state.latents)

        scale, both = self.settings.guidance_scale, self.settings.guidance_gradient == "both"
        prompt = (condition.text, condition.text_mask)
        if scale == 1:
            return branch("cond", *prompt)
        negative = self._negative(condition)
        if both and self.settings.guidance_passes == "joint":
            conditional, unconditional = branch("joint", *_joined(prompt, negative)).chunk(2)
        else:
            conditional = branch("cond", *prompt)
            with torch.set_grad_enabled(torch.is_grad_enabled() and both):
                unconditional = branch("uncond", *negative)
        return unconditional + scale * (conditional - unconditional)

    def _negative(self, condition: OpenSoraCondition) -> tuple[Tensor, Tensor | None]:
        """Text of the unconditional branch. The null caption is as long as the prompt, the way the model was trained and sampled."""
        if condition.negative_text is not None:
            return condition.negative_text, condition.negative_text_mask
        batch, length = condition.text.shape[:2]
        null = self.transformer.y_embedder.y_embedding
        if length > len(null):
            raise ValueError(f"condition: expected prompts of at most {len(null)} tokens, got {length}")
        return null[:length].expand(batch, -1, -1), condition.text_mask

    def _forward(
        self, name: str, state: OpenSoraState, step: Step, text: Tensor, mask: Tensor | None, forward: Forward
    ) -> Tensor:
        """The velocity [len(text), ...] for each of the texts, in float32; latents are repeated for them."""
        settings = self.settings
        times = len(text) // len(state.latents)
        latents, frames = network_input(state, step), active_frames(state, step)
        with self.transformer.cache_context(name, step_index=step.index, sigma=step.sigma, timestep=step.timestep):
            output = forward(
                hidden_states=latents.repeat(times, 1, 1, 1, 1),
                timestep=torch.full((len(text),), step.timestep, device=latents.device),
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                frame_mask=frames.repeat(times, 1),
                height=settings.height,
                width=settings.width,
                fps=settings.fps,
                return_dict=False,
            )
        return output[0][:, : latents.shape[1]].float()

    def advance(self, state: OpenSoraState, velocity: Tensor, step: Step) -> OpenSoraState:
        return advanced(state, velocity, step)

    def decode(self, latents: Tensor, frames: Sequence[int] | None = None, *, checkpoint: bool = True) -> Tensor:
        with without_autocast(latents.device):
            pixels = self.vae.decode(latents, self.settings.num_frames, frames, checkpoint=checkpoint)
        return pixels.transpose(1, 2).float().mul(0.5).add(0.5).clamp(0, 1)


def _joined(*texts: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Texts one batch after the other, the shorter padded, in the wider of their dtypes."""
    tokens, masks = zip(*padded_texts(texts), strict=True)
    return torch.cat(tokens), None if masks[0] is None else torch.cat(masks)
