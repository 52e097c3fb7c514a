"""The negative Video Consistency Distance as a reward (arXiv 2510.19193, Eq. 2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from vcd_fast.distance import PRESETS, VCDConfig, VCDLoss, VGG19Features
from vcd_fast.distance.config import resolve_config
from vcd_fast.distance.features import VGG19_LAYERS, pools_before
from vcd_fast.rewards.base import RewardInput, RewardOutput


class VCDRewardSettings(BaseModel):
    """The section `reward` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distance: Literal[tuple(PRESETS)] = Field("vcd", description="preset of the distance")  # type: ignore[valid-type]
    feature_layers: tuple[str, ...] | None = Field(
        None, description="feature maps of VGG19 to compare, relu1_1 to relu5_4; default: those of the preset"
    )
    num_projections: int = Field(256, gt=0, description="directions of the sliced Wasserstein distance")
    redraw_projections: bool = Field(False, description="draw new directions at every optimizer step")
    projection_seed: int = Field(0, ge=0, description="seed of the directions")
    frames_per_step: int = Field(
        1, gt=0, description="random frames 1..N-1 decoded and judged per step; the paper takes one"
    )
    reward_scale: float = Field(1.0, gt=0, description="factor on the reward; matters only through gradient clipping")
    vgg19: str = Field("imagenet", description="VGG19 weights: imagenet, random, or a file")
    backend: Literal["auto", "reference", "simd", "triton"] = Field(
        "auto", description="implementation of the distance"
    )
    chunk_frames: int | None = Field(None, gt=0, description="frames judged at a time; bounds the memory of VGG19")

    @field_validator("feature_layers")
    @classmethod
    def _known_layers(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None:
            if unknown := [name for name in names if name not in VGG19_LAYERS]:
                raise ValueError(
                    f"expected names from {VGG19_LAYERS[0]} to {VGG19_LAYERS[-1]}, not {', '.join(unknown)}"
                )
            if not names or len(set(names)) < len(names):
                raise ValueError("expected at least one name, each once")
        return names

    @property
    def config(self) -> VCDConfig:
        """The distance these settings stand for."""
        changes = {"num_projections": self.num_projections, "seed": self.projection_seed}
        if self.feature_layers is not None:
            changes["layers"] = self.feature_layers
        return resolve_config(self.distance, changes)

    def check_size(self, height: int, width: int) -> None:
        """Whether frames of this size, in pixels, can be judged: known before weights are loaded and pictures encoded.

        Raises:
            ValueError: a feature map would be empty, or smaller than the patches of the distance.
        """
        config = self.config
        least = config.patch_size if config.slicing == "patch" else 1
        for name in config.layers:
            map_height, map_width = (side // 2 ** pools_before(name) for side in (height, width))
            if min(map_height, map_width) < least:
                raise ValueError(
                    f"reward.distance: expected feature maps of at least {least}×{least} for {self.distance!r}, got {map_height}×{map_width} "
                    f"({name} of {height}×{width} frames); use larger frames, or fewer layers by reward.feature_layers"
                )


class VCDReward:
    """reward = -scale * VCD, the mean over the frames judged; larger is better, 0 is the largest."""

    def __init__(self, settings: VCDRewardSettings, device: torch.device | str = "cpu"):
        self.settings = settings
        self.device = torch.device(device)
        self._extractor = VGG19Features(settings.vgg19, layers=settings.config.layers)
        self._losses: dict[int, VCDLoss] = {}

    def to(self, device: torch.device | str) -> VCDReward:
        self.device = torch.device(device)
        self._extractor.to(device)
        for loss in self._losses.values():
            loss.to(device)
        return self

    def frames_wanted(self, num_frames: int, generator: torch.Generator) -> torch.Tensor:
        """[T] int64: distinct frames out of 1..num_frames-1, ascending, uniformly drawn.

        Raises:
            ValueError: more frames per step than the clip has.
        """
        wanted = self.settings.frames_per_step
        if wanted > num_frames - 1:
            raise ValueError(
                f"frames_per_step: expected at most {num_frames - 1} for a clip of {num_frames} frames, got {wanted}"
            )
        return 1 + torch.randperm(num_frames - 1, generator=generator)[:wanted].sort().values

    def __call__(self, inputs: RewardInput) -> RewardOutput:
        distance = self._loss(inputs.step)(
            inputs.video,
            inputs.image,
            frame_index=inputs.frame_index,
            num_frames=inputs.num_frames,
            reduction="none",
        ).mean(dim=1)
        return RewardOutput(-self.settings.reward_scale * distance, {"vcd": distance.detach().mean().item()})

    @torch.no_grad()
    def score(self, video: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The distance itself, of whole clips and always with the same directions: for held-out evaluation.

        Args:
            video: [B, N, 3, H, W] in [0, 1], all frames.
            image: [B, 3, H, W] in [0, 1].

        Returns:
            [B] float32, smaller is better.
        """
        return self._loss(0)(video.to(self.device), image.to(self.device), reduction="none").mean(dim=1)

    def _loss(self, step: int) -> VCDLoss:
        """The loss of this step; one object unless directions are redrawn, in which case only the newest is kept."""
        seed = self.settings.projection_seed + (step if self.settings.redraw_projections else 0)
        if seed not in self._losses:
            loss = VCDLoss(
                self.settings.config,
                extractor=self._extractor,
                backend=self.settings.backend,
                chunk_frames=self.settings.chunk_frames,
                seed=seed,
            )
            self._losses = {seed: loss.to(self.device)}
        return self._losses[seed]
