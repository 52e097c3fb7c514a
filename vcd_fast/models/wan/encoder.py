"""Prompts, pictures and the video to complete, encoded as `WanImageToVideoPipeline` does: one sub-model in memory at a time."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vcd_fast.models.base import Generators
from vcd_fast.models.encoders import check_inputs, free_memory
from vcd_fast.models.hub import content_digest
from vcd_fast.models.random_weights import SEED, warn_random
from vcd_fast.models.wan import tiny
from vcd_fast.models.wan.condition import TEXT_TOKENS, WanCondition, mask_channels
from vcd_fast.models.wan.loading import encoder_parts, read_config, resolve
from vcd_fast.models.wan.settings import TINY, TINY_NAMES, ModelSettings, latent_shape

VERSION = 1
"""Raise it when the same weights and inputs encode to something else: cached encodings are then computed anew."""


def load_encoder(settings: ModelSettings, device: torch.device | str = "cpu") -> WanEncoder:
    """The encoder of `settings.weights`; its weights are found and checked here, and loaded by `encode`.

    Raises:
        ValueError, OSError: the weights are not there; the message says which part and how to get it.
    """
    return WanEncoder(settings, device)


class WanEncoder:
    """UMT5, CLIP (where the transformer takes image states) and the VAE's encoder, each loaded, used and freed in turn.

    Every sample is encoded alone, so its encoding does not depend on its batch.
    """

    condition_type = WanCondition

    def __init__(self, settings: ModelSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.device = torch.device(device)
        self._folder: Path | None = None
        if settings.weights in TINY_NAMES:
            self.has_image_encoder = settings.weights == TINY
            weights = f"{settings.weights}:{SEED}"
        else:
            self.has_image_encoder = (
                read_config(resolve(settings, ["transformer"]), "transformer").get("image_dim") is not None
            )
            parts = encoder_parts(self.has_image_encoder)
            self._folder = resolve(settings, parts)
            weights = content_digest({part: self._folder / part for part in parts})
        choices = f"{VERSION}|{weights}|{self._text_dtype}|{settings.vae_dtype}|{settings.clip_preprocess}"
        self.fingerprint = "wan-" + sha256(choices.encode()).hexdigest()[:32]

    @property
    def _text_dtype(self) -> torch.dtype:
        # UMT5 overflows in float16; bfloat16 is what Wan runs it in.
        return torch.float32 if self.settings.dtype == "float32" else torch.bfloat16

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
    ) -> WanCondition:
        """images [B, 3, H, W] float32 in [0, 1] of the clip's size -> condition of batch size B on the CPU.

        Nothing is drawn: `generator` is part of the protocol only.

        Raises:
            ValueError: images of another size than `height` x `width`, or not as many prompts as images.
        """
        check_inputs(images, prompts, negative_prompts, height, width)
        if self.settings.weights in TINY_NAMES:
            warn_random(f"model.weights={self.settings.weights}")
        text = self._freed(self._encode_text, [*prompts, *negative_prompts])
        return WanCondition(
            prompt_embeds=text[: len(prompts)],
            negative_prompt_embeds=text[len(prompts) :],
            latents=self._freed(self._encode_latents, images, num_frames),
            image_embeds=self._freed(self._encode_images, images) if self.has_image_encoder else None,
        )

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        tokenizer = self._tokenizer()
        states = {}
        encoder = self._ready("text_encoder")
        for prompt in dict.fromkeys(cleaned):
            tokens = tokenizer(
                [prompt], padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
            ).to(self.device)
            found = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
            length = int(tokens.attention_mask.sum())
            states[prompt] = F.pad(found[:, :length], (0, 0, 0, TEXT_TOKENS - length)).cpu()
        return torch.cat([states[prompt] for prompt in cleaned])

    def _encode_images(self, images: Tensor) -> Tensor:
        processor = self._image_processor()
        encoder = self._ready("image_encoder")
        preprocess = _cropped if self.settings.clip_preprocess == "crop" else _squashed
        size = encoder.config.image_size
        states = [
            encoder(preprocess(image, processor, size).to(self.device), output_hidden_states=True).hidden_states[-2]
            for image in images
        ]
        return torch.cat(states).cpu()

    def _encode_latents(self, images: Tensor, num_frames: int) -> Tensor:
        frames, height, width = latent_shape(num_frames, *images.shape[-2:])
        vae = self._ready("vae")
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        encoded = []
        for image in images:
            video = torch.zeros(1, 3, num_frames, *image.shape[-2:])
            video[:, :, 0] = 2.0 * image.float() - 1.0
            latents = vae.encode(video.to(self.device, vae.dtype)).latent_dist.mode().float().cpu()
            encoded.append((latents - mean) * (1.0 / std))
        return torch.cat([mask_channels(len(images), frames, height, width), torch.cat(encoded)], dim=1)

    def _freed(self, encode: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The result of a method that loads one sub-model, with its memory given back before the next one is loaded."""
        result = encode(*arguments)
        free_memory(self.device, collect=self._folder is not None)
        return result

    def _ready(self, part: str) -> nn.Module:
        return self._load(part).eval().requires_grad_(False).to(self.device)

    def _load(self, part: str) -> nn.Module:
        vae_dtype = getattr(torch, self.settings.vae_dtype)
        if self._folder is None:
            makers: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
                "text_encoder": (tiny.tiny_text_encoder, self._text_dtype),
                "image_encoder": (tiny.tiny_image_encoder, torch.float32),
                "vae": (tiny.tiny_vae, vae_dtype),
            }
            make, dtype = makers[part]
            model = make()
            return model if model.dtype == dtype else model.to(dtype)
        if part == "vae":
            from diffusers import AutoencoderKLWan

            return AutoencoderKLWan.from_pretrained(
                self._folder, subfolder=part, torch_dtype=vae_dtype, local_files_only=True
            )
        import transformers

        name, dtype = {
            "text_encoder": ("UMT5EncoderModel", self._text_dtype),
            "image_encoder": ("CLIPVisionModel", torch.float32),
        }[part]
        return getattr(transformers, name).from_pretrained(
            self._folder, subfolder=part, dtype=dtype, local_files_only=True
        )

    def _tokenizer(self) -> Any:
        if self._folder is None:
            return tiny.tiny_tokenizer()
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, subfolder="tokenizer", local_files_only=True)

    def _image_processor(self) -> Any:
        if self._folder is None:
            return tiny.tiny_image_processor()
        return tiny.image_processor_class().from_pretrained(
            self._folder, subfolder="image_processor", local_files_only=True
        )


def clean_prompt(prompt: str) -> str:
    """Mend encoding errors, resolve HTML entities (twice, as they come doubled) and collapse white space, as Wan does."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip()


def _cropped(image: Tensor, processor: Any, size: int) -> Tensor:
    """[3, H, W] in [0, 1] -> [1, 3, size, size], the centre square, by the pipeline's own processor."""
    from PIL import Image

    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values


def _squashed(image: Tensor, processor: Any, size: int) -> Tensor:
    """[3, H, W] in [0, 1] -> [1, 3, size, size], the whole picture, bicubic without antialiasing (Wan's `clip.py`)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    scaled = F.interpolate(image[None].float() * 2 - 1, size=(size, size), mode="bicubic", align_corners=False)
    return (scaled * 0.5 + 0.5 - mean) / std
