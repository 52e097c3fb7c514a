"""Wan 2.1 I2V as the sampler sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from vcd_fast.models.base import Branchwise, Generators, Schedule, State, Step
from vcd_fast.models.checkpointing import block_checkpointing
from vcd_fast.models.noise import draw_noise
from vcd_fast.models.quantized import quantize_linears
from vcd_fast.models.random_weights import warn_random
from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.condition import WanCondition
from vcd_fast.models.wan.decode import WanDecoder
from vcd_fast.models.wan.loading import read_config, resolve
from vcd_fast.models.wan.schedule import flow_schedule
from vcd_fast.models.wan.settings import TINY, TINY_NAMES, ModelSettings
from vcd_fast.models.wan.targets import LORA_TARGETS

LATENT_CHANNELS = 16
"""of Wan 2.1's VAE; another of its class may have others"""
MASK_CHANNELS = 4


def load_model(settings: ModelSettings, device: torch.device | str = "cpu") -> WanI2V:
    """The transformer (in `settings.dtype`, except the parts Wan keeps in float32) and the VAE's decoder, frozen.

    Raises:
        ValueError, OSError: weights that are not there, or not those of a Wan I2V model.
    """
    if settings.weights in TINY_NAMES:
        warn_random(f"model.weights={settings.weights}")
        transformer = cast_keeping_float32(
            tiny.tiny_transformer(image_encoder=settings.weights == TINY), getattr(torch, settings.dtype)
        )
        vae = cast_keeping_float32(tiny.tiny_vae(), getattr(torch, settings.vae_dtype))
    else:
        transformer, vae = _from_folder(settings)
    quantize_linears(transformer.blocks, settings.quantization, getattr(torch, settings.dtype), device)
    return WanI2V(transformer, vae, settings).to(device)


def _from_folder(settings: ModelSettings) -> tuple[nn.Module, nn.Module]:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    folder = resolve(settings, ["transformer", "vae"])
    channels, latent = (
        read_config(folder, part).get(key, default)
        for part, key, default in (("transformer", "in_channels", None), ("vae", "z_dim", LATENT_CHANNELS))
    )
    if channels != 2 * latent + MASK_CHANNELS:
        raise ValueError(
            f"model.weights: expected an image-to-video transformer with {2 * latent + MASK_CHANNELS} input channels in "
            f"{folder / 'transformer'}, got {channels} ({latent} would be a text-to-video model)"
        )
    transformer = WanTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=getattr(torch, settings.dtype), local_files_only=True
    )
    vae = AutoencoderKLWan.from_pretrained(
        folder, subfolder="vae", torch_dtype=getattr(torch, settings.vae_dtype), local_files_only=True
    )
    return transformer, vae


def cast_keeping_float32(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What `from_pretrained(torch_dtype=...)` does: `dtype` everywhere but in the modules the class keeps in float32."""
    kept = model._keep_in_fp32_modules or []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not any(part in kept for part in name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


class WanI2V:
    """Implements `vcd_fast.models.base.I2VModel`; see there for what the methods promise."""

    family = "wan"
    lora_targets = LORA_TARGETS

    def __init__(self, transformer: nn.Module, vae: nn.Module, settings: ModelSettings) -> None:
        self.settings = settings
        self.transformer = transformer.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.vae.encoder = self.vae.quant_conv = (
            None  # pictures are encoded by WanEncoder; half of the VAE is saved here
        )
        self._set_attention_backend(settings.attention_backend)
        self._decoder = WanDecoder(
            self.vae,
            context=settings.decode_context,
            checkpointing=settings.decode_checkpointing,
            frozen_conv=settings.frozen_conv,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer's inputs are cast to."""
        return getattr(torch, self.settings.dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def to(self, device: torch.device | str) -> WanI2V:
        """Move the weights. Their dtypes stay: casting the whole transformer would destroy its float32 parts."""
        self.transformer.to(device)
        self.vae.to(device)
        return self

    def block_checkpointing(self, enabled: bool) -> AbstractContextManager[None]:
        return block_checkpointing(self.transformer, enabled)

    def schedule(self, sampling_steps: int, height: int, width: int, num_frames: int) -> Schedule:
        return flow_schedule(sampling_steps, self.settings.shift)

    def initial(self, condition: WanCondition, generator: Generators) -> State:
        batch, channels, *size = condition.latents.shape
        noise = draw_noise((channels - MASK_CHANNELS, *size), batch, generator)
        return State(noise.to(condition.latents.device))

    def velocity(
        self,
        state: State,
        step: Step,
        condition: WanCondition,
        forward: Callable[..., object] | None = None,
        branchwise: Branchwise | None = None,
    ) -> Tensor:
        def branch(name: str) -> Tensor:
            run = partial(self._branch, name, step, condition, forward)
            return run(state.latents) if branchwise is None else branchwise(run, state.latents)

        scale = self.settings.guidance_scale
        conditional = branch("cond")
        if scale == 1:
            return conditional
        both = self.settings.guidance_gradient == "both"
        with torch.set_grad_enabled(torch.is_grad_enabled() and both):
            unconditional = branch("uncond")
        return unconditional + scale * (conditional - unconditional)

    def _branch(
        self, name: str, step: Step, condition: WanCondition, forward: Callable[..., object] | None, latents: Tensor
    ) -> Tensor:
        prompt = condition.prompt_embeds if name == "cond" else condition.negative_prompt_embeds
        image = condition.image_embeds
        with self.transformer.cache_context(name, step_index=step.index, sigma=step.sigma, timestep=step.timestep):
            output = (forward or self.transformer)(
                hidden_states=torch.cat([latents, condition.latents], dim=1).to(self.dtype),
                timestep=torch.full((len(prompt),), step.timestep, dtype=torch.float32, device=prompt.device),
                encoder_hidden_states=prompt.to(self.dtype),
                encoder_hidden_states_image=None if image is None else image.to(self.dtype),
                return_dict=False,
            )
        return output[0].float()

    def advance(self, state: State, velocity: Tensor, step: Step) -> State:
        return State(state.latents + step.dt * velocity)

    def decode(self, latents: Tensor, frames: Sequence[int] | None = None, *, checkpoint: bool = True) -> Tensor:
        return self._decoder(latents, frames, checkpoint=checkpoint)

    def _set_attention_backend(self, name: str) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        known = [backend.value for backend in AttentionBackendName]
        name = "native" if name == "sdpa" else name
        if name not in known:
            raise ValueError(f"model.attention_backend: expected sdpa or one of {', '.join(known)}, got {name!r}")
        if (
            name == "native"
        ):  # by hand: diffusers' setter warns, and would change the default of every other model as well
            for module in self.transformer.modules():
                if hasattr(getattr(module, "processor", None), "_attention_backend"):
                    module.processor._attention_backend = AttentionBackendName.NATIVE
            return
        try:
            self.transformer.set_attention_backend(name)
        except (RuntimeError, ImportError) as error:
            raise ImportError(
                f"model.attention_backend={name} cannot be used here: {error}. `sdpa` always can."
            ) from error
