"""What a user may choose about Open-Sora 1.2: the section `model` of a run with `--model opensora`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from vcd_fast.models.base import BaseModelSettings
from vcd_fast.models.opensora.conditioning import parse_strategy

DEFAULT_PRESET = "240p"
"""the setting of arXiv 2510.19193, with published weights"""

TINY = "tiny-random"
TRANSFORMER = "hpcai-tech/OpenSora-STDiT-v3"
VAE = "hpcai-tech/OpenSora-VAE-v1.2"
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"

CHUNK_FRAMES = 17
SPATIAL_FACTOR = 8
MINIMUM_SIDE = 16


class ModelSettings(BaseModelSettings):
    """Open-Sora 1.2; the defaults are the setting of arXiv 2510.19193 and of VADER ("240p 3:4, 2 s"): 51 frames of (276, 368), guidance 7."""

    weights: str | None = Field(
        None,
        description=f"transformer: folder or hub name ({TRANSFORMER}), or a folder with the sub-folders transformer, vae, text_encoder and "
        f"tokenizer; `{TINY}` for seeded random weights in small models of the same classes",
    )
    vae_weights: str | None = Field(
        None, description=f"VAE: folder or hub name; unset: sub-folder vae of `weights` where there is one, else {VAE}"
    )
    text_encoder_weights: str | None = Field(
        None,
        description="T5 and its tokenizer: folder or hub name; unset: sub-folders text_encoder and tokenizer of `weights` where there are "
        f"any, else {TEXT_ENCODER}",
    )
    text_encoder_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of T5's weights (19 GB in float32, half of that in bfloat16)"
    )
    height: int = Field(
        276,
        ge=MINIMUM_SIDE,
        description="height of the video in pixels; what 8 does not divide is cut off, 276 decodes to 272",
    )
    width: int = Field(368, ge=MINIMUM_SIDE, description="width of the video in pixels, cut in the same way")
    num_frames: int = Field(51, gt=1, description="frames of a clip, the conditioning image included: a multiple of 17")
    fps: float = Field(
        24.0, gt=0, description="frames per second that the model is told and that videos are written with"
    )
    guidance_scale: float = Field(7.0, ge=1, description="classifier-free guidance; 1 switches the second branch off")
    guidance_passes: Literal["joint", "separate"] = Field(
        "joint",
        description="both branches of guidance in one forward, or one after the other (a block's memory halves); `conditional` gradients are "
        "always separate",
    )
    negative_prompt: str = Field(
        "",
        description="prompt of the unconditional branch; empty: the model's own null caption, what it was trained with",
    )
    aesthetic_score: float | None = Field(
        6.5, description="appended to prompts as Open-Sora was trained (`aesthetic score: 6.5.`); none: nothing"
    )
    motion_score: float | None = Field(None, description="appended to prompts (`motion score: 5.0.`), the same way")
    camera_motion: str | None = Field(
        None, description="appended to prompts (`camera motion: pan left.`), the same way"
    )
    mask_strategy: str = Field(
        "0",
        description="which latent frames the image conditions, in Open-Sora's notation: `0` the first one exactly; `0,0,0,0,1,0.4` the first "
        "one, generated anew from noise level 0.4 on",
    )
    attention_backend: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="attention kernel; xformers runs on GPUs only"
    )
    frozen_conv: bool = Field(
        True, description="VAE convolutions keep no input for the gradient of weights that are frozen (exact)"
    )

    @field_validator("num_frames")
    @classmethod
    def _whole_chunks(cls, value: int) -> int:
        if value % CHUNK_FRAMES:
            low = max(CHUNK_FRAMES, value // CHUNK_FRAMES * CHUNK_FRAMES)
            raise ValueError(
                f"expected a multiple of {CHUNK_FRAMES}, what the VAE was trained with; the nearest are {low} and {low + CHUNK_FRAMES}"
            )
        return value

    @field_validator("mask_strategy")
    @classmethod
    def _one_image(cls, value: str) -> str:
        for placement in parse_strategy(value):
            if placement.loop or placement.reference or placement.reference_start not in (0, -1):
                raise ValueError(f"expected placements of reference 0 of loop 0, the one image there is, got {value!r}")
        return value

    @property
    def decoded_size(self) -> tuple[int, int]:
        """Height and width of decoded frames; a picture is compared with them after its bottom and right are cut off to this."""
        return tuple(side // SPATIAL_FACTOR * SPATIAL_FACTOR for side in (self.height, self.width))
