"""What the cases are computed on: VGG19 features of a photograph and of a camera that moves over it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import CHANNELS, Case
from vcd_fast import PRESETS, VCDConfig, VGG19Features
from vcd_fast.distance.projections import draw_projections
from vcd_fast.media import read_image, resize_crop

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
PICTURE = "astronaut.jpg"
STEP = (1, 3)
"""pixels down and right that the camera moves from frame to frame"""
TRAVEL = 50
"""frames after which it has come to the end of the picture, and starts again"""
NOISE = 2 / 255
SEED = 0

Extractor = Callable[[Tensor], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class LayerInput:
    x: Tensor
    """[1, C, H, W] maps of a frame"""
    y: Tensor
    """[1, C, H, W] maps of the condition"""
    filters: Tensor
    """[K, C, k, k] directions"""


@dataclasses.dataclass(frozen=True)
class VideoInput:
    video: Tensor
    """[1, frames + 1, 3, H, W] in [0, 1], the condition first"""
    extractor: Extractor
    filters: Mapping[str, Tensor]
    """[K, C, k, k] directions of each layer"""


def config_of(case: Case) -> VCDConfig:
    return dataclasses.replace(PRESETS[case.reading], num_projections=case.num_projections, seed=SEED)


@functools.lru_cache(maxsize=2)
def clip(frames: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """[1, frames + 1, 3, H, W] in [0, 1]: the condition, then `frames` frames, each moved on, with a little noise."""
    height, width = size
    picture = resize_crop(read_image(PICTURES / PICTURE), height + STEP[0] * TRAVEL, width + STEP[1] * TRAVEL)
    generator = torch.Generator().manual_seed(SEED)
    video = torch.empty(1, frames + 1, 3, height, width)
    for i in range(frames + 1):
        top, left = (step * (i % (TRAVEL + 1)) for step in STEP)
        video[0, i] = picture[:, top : top + height, left : left + width]
        if i:
            video[0, i] += NOISE * torch.randn(video[0, i].shape, generator=generator)
    return video.clamp_(0, 1).to(device)


@functools.lru_cache(maxsize=4)
def vgg19(weights: str, layers: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> VGG19Features:
    """VGG19; the warning about random weights is for those who want distances, not times."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="VGG19 has random weights", category=UserWarning)
        return VGG19Features(weights, layers=layers).to(device, dtype)


def filters(case: Case, layer: str, device: torch.device) -> Tensor:
    """[K, C, k, k] float32: the directions that the library draws for this layer."""
    channels, patch = CHANNELS[f"{layer[:5]}_1"], case.patch_size
    drawn = draw_projections(SEED, layer, case.num_projections, channels, patch)
    return drawn.unflatten(1, (channels, patch, patch)).to(device, torch.float32)


@functools.lru_cache(maxsize=1)
def _layer_maps(layer: str, size: tuple[int, int], weights: str, device: torch.device) -> Tensor:
    extractor = vgg19(weights, (layer,), device, torch.float32)
    with torch.no_grad():
        return extractor(clip(1, size, device)[0])[layer]


def layer_input(case: Case, device: torch.device, weights: str) -> LayerInput:
    maps = _layer_maps(case.layer, case.size, weights, device)
    return LayerInput(maps[1:], maps[:1], filters(case, case.layer, device))


def video_input(case: Case, device: torch.device, weights: str) -> VideoInput:
    layers = config_of(case).layers
    return VideoInput(
        clip(case.frames, case.size, device),
        vgg19(weights, layers, device, getattr(torch, case.dtype)),
        {name: filters(case, name, device) for name in layers},
    )
