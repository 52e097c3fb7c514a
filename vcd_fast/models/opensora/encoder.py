"""Prompts and the conditioning picture, encoded as Open-Sora does: T5, then the VAE, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor, nn

from vcd_fast.models.base import Generators
from vcd_fast.models.encoders import check_inputs, free_memory
from vcd_fast.models.hub import content_digest
from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.condition import OpenSoraCondition
from vcd_fast.models.opensora.files import TEXT_ENCODER_PART, TOKENIZER_PART, VAE_PART, resolve
from vcd_fast.models.opensora.loading import load_text_encoder, load_tokenizer, load_vae
from vcd_fast.models.opensora.settings import TINY, ModelSettings
from vcd_fast.models.opensora.text import append_scores, clean_caption, embed, prepare_prompts
from vcd_fast.models.random_weights import SEED, warn_random

VERSION = 1
"""Raise it when the same weights and inputs encode to something else: cached encodings are then computed anew."""


def load_encoder(settings: ModelSettings, device: torch.device | str = "cpu") -> OpenSoraEncoder:
    """The encoder of `settings`; its weights are found and checked here, and loaded by `encode`.

    Raises:
        ValueError, OSError: the weights are not there; the message says which part and how to get it.
    """
    return OpenSoraEncoder(settings, device)


class OpenSoraEncoder:
    """Implements `vcd_fast.models.base.Encoder`. Every sample is encoded alone, so its encoding does not depend on its batch."""

    condition_type = OpenSoraCondition

    def __init__(self, settings: ModelSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.device = torch.device(device)
        self._folders = {}
        weights = f"{TINY}:{SEED}"
        if settings.weights != TINY:
            self._folders = {part: resolve(settings, part) for part in (TEXT_ENCODER_PART, TOKENIZER_PART, VAE_PART)}
            weights = content_digest({part.name: folder for part, folder in self._folders.items()})
        choices = (
            VERSION,
            weights,
            settings.text_encoder_dtype,
            settings.vae_dtype,
            settings.aesthetic_score,
            settings.motion_score,
            settings.camera_motion,
        )
        self.fingerprint = "opensora-" + sha256("|".join(map(str, choices)).encode()).hexdigest()[:32]

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        height: int,
        width: int,
        num_frames: int,
        generator: Generators | None = None,
    ) -> OpenSoraCondition:
        """images [B, 3, H, W] float32 in [0, 1] of the clip's size -> condition of batch size B on the CPU.

        The image's latent is the mean of the VAE's posteriors; Open-Sora draws from them. So nothing is drawn here: `generator` is part
        of the protocol only, as `num_frames` is. An empty negative prompt stands for the transformer's null caption.

        Raises:
            ValueError: images of another size than `height` x `width`, not as many prompts as images, an empty prompt, or negative
                prompts that are empty for some of the images only.
        """
        check_inputs(images, prompts, negative_prompts, height, width)
        if self.settings.weights == TINY:
            warn_random(f"model.weights={TINY}")
        texts, negative_texts = self._encode_text(prompts, negative_prompts)
        latents = self._encode_images(images)
        return OpenSoraCondition.collate(
            [
                OpenSoraCondition(image_latents=latent, text=text, negative_text=negative)
                for latent, text, negative in zip(latents, texts, negative_texts, strict=True)
            ]
        )

    def _encode_text(
        self, prompts: Sequence[str], negative_prompts: Sequence[str]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        settings = self.settings
        scores = partial(
            append_scores,
            aesthetic_score=settings.aesthetic_score,
            motion_score=settings.motion_score,
            camera_motion=settings.camera_motion,
        )
        prepared = prepare_prompts(prompts, scores)
        negative = [clean_caption(prompt) for prompt in negative_prompts]
        if any(negative) and not all(negative):
            raise ValueError(f"negative_prompts: expected all of them empty or none, got {list(negative_prompts)}")
        everything = [*prepared, *(negative if any(negative) else [])]
        dtype = getattr(torch, settings.text_encoder_dtype)
        if settings.weights == TINY:
            tokenizer, load = tiny.tiny_tokenizer(), partial(tiny.tiny_text_encoder, dtype)
        else:
            tokenizer = load_tokenizer(self._folders[TOKENIZER_PART])
            load = partial(load_text_encoder, self._folders[TEXT_ENCODER_PART], dtype)
        states = self._used(load, lambda text_encoder: embed(everything, tokenizer, text_encoder))
        embedded = [each[None] for each in states]
        return embedded[: len(prompts)], embedded[len(prompts) :] or [None] * len(prompts)

    def _encode_images(self, images: Tensor) -> list[Tensor]:
        dtype = getattr(torch, self.settings.vae_dtype)
        if self.settings.weights == TINY:
            load = partial(tiny.tiny_vae, dtype)
        else:
            load = partial(load_vae, self._folders[VAE_PART], dtype)
        pixels = (2.0 * images.float() - 1.0)[:, None, :, None]
        return self._used(load, lambda vae: [vae.encode(image.to(self.device)).cpu() for image in pixels])

    def _used(self, load: Callable[[], nn.Module], work: Callable[[nn.Module], list[Tensor]]) -> list[Tensor]:
        """`work` of a model that is loaded for it, with its memory given back before the next one is."""
        result = work(load().eval().requires_grad_(False).to(self.device))
        free_memory(self.device, collect=bool(self._folders))
        return result
