"""What a user may choose about Wan 2.1 image-to-video: the section `model` of a run with `--model wan`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from vcd_fast.models.base import BaseModelSettings

DEFAULT_PRESET = "1.3b"
"""the setting of arXiv 2510.19193, with published weights"""

TINY = "tiny-random"
TINY_WITHOUT_IMAGE_ENCODER = "tiny-random-no-image-encoder"
TINY_NAMES = (TINY, TINY_WITHOUT_IMAGE_ENCODER)
TINY_I2V = "tiny-i2v"
"""the small trained model that comes with the package; see examples/tiny_i2v"""

TEMPORAL_FACTOR = 4
"""frames per latent frame, the first one excepted"""
SPATIAL_FACTOR = 8
"""pixels per latent pixel"""
PATCH = 2
"""latent pixels per token, in height and width"""


class ModelSettings(BaseModelSettings):
    """Wan 2.1 I2V; the defaults are the setting of arXiv 2510.19193 (25 frames of 368x272, guidance 5, shift 3)."""

    weights: str | None = Field(
        None,
        description=f"folder or hub name of a WanImageToVideoPipeline in diffusers layout; `{TINY_I2V}` for the small trained model that "
        f"comes with the package; `{TINY}` (or `{TINY_WITHOUT_IMAGE_ENCODER}`) for seeded random weights in small models of the real classes",
    )
    height: int = Field(272, gt=0, description="height of the video in pixels, a multiple of 16")
    width: int = Field(368, gt=0, description="width of the video in pixels, a multiple of 16")
    num_frames: int = Field(25, gt=1, description="frames of a clip, the conditioning image included: 4n + 1")
    fps: float = Field(16.0, gt=0, description="frames per second written into videos")
    guidance_scale: float = Field(5.0, ge=1, description="classifier-free guidance; 1 switches the second branch off")
    shift: float = Field(3.0, gt=0, description="shift of the noise levels: 3 at 480p and below, 5 at 720p")
    attention_backend: str = Field(
        "sdpa",
        description="attention kernel, a name of diffusers' dispatcher: sdpa (the same as native), xformers, flash, sage, flex, ...",
    )
    clip_preprocess: Literal["crop", "squash"] = Field(
        "crop",
        description="what the image encoder sees: `crop` the centre square (diffusers), `squash` the whole picture (Wan's own code)",
    )
    decode_context: Literal["exact", "truncated"] = Field(
        "exact",
        description="gradient of the decoded frames: `exact` with respect to all latents before them, `truncated` with "
        "respect to the latent of their own chunk only (same pixels, less memory and time, a known bias)",
    )
    decode_checkpointing: Literal["chunk", "resnet"] = Field(
        "chunk",
        description="what the decode recomputes in the backward: whole chunks, or within a chunk residual block by residual block",
    )
    frozen_conv: bool = Field(
        True, description="VAE convolutions keep no input for the gradient of weights that are frozen (exact)"
    )

    @field_validator("height", "width")
    @classmethod
    def _multiple_of_sixteen(cls, value: int) -> int:
        unit = SPATIAL_FACTOR * PATCH
        if value % unit:
            low = max(unit, value // unit * unit)
            raise ValueError(f"expected a multiple of {unit}, got {value}; the nearest are {low} and {low + unit}")
        return value

    @field_validator("num_frames")
    @classmethod
    def _whole_latent_frames(cls, value: int) -> int:
        if value % TEMPORAL_FACTOR != 1:
            low = max(5, (value - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
            raise ValueError(f"expected 4n + 1 frames, got {value}; the nearest are {low} and {low + TEMPORAL_FACTOR}")
        return value

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip's latents."""
        return latent_shape(self.num_frames, self.height, self.width)


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Frames, height and width of the latents of a clip of `num_frames` frames of `height` x `width` pixels."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR
