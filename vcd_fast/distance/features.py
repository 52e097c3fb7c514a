"""Feature maps of images: VGG19, and what another extractor has to offer to take its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from vcd_fast.distance.config import VCD_LAYERS
from vcd_fast.frozen_conv import frozen_conv
from vcd_fast.weights import WeightFile, load_vgg19

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VGG19_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class FeatureExtractor(Protocol):
    """What `VCDLoss(extractor=…)` accepts. Its parameters are constants: gradients flow to the images only.

    It may declare `minimum_size`, the least height and width in pixels it takes.
    """

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W] in [0, 1] -> feature maps [B, C, h, w] by layer name, sample by sample."""
        ...


def _vgg19_layout() -> list[tuple[str, int, int]]:
    """Layers of `torchvision.models.vgg19().features` in order: (name, input channels, output channels)."""
    layout, channels = [], 3
    for block, (width, convolutions) in enumerate(VGG19_BLOCKS, 1):
        for i in range(1, convolutions + 1):
            layout += [(f"conv{block}_{i}", channels, width), (f"relu{block}_{i}", width, width)]
            channels = width
        layout.append((f"pool{block}", channels, channels))
    return layout


VGG19_LAYERS = tuple(name for name, _, _ in _vgg19_layout() if name.startswith("relu"))


def pools_before(layer: str) -> int:
    """How often VGG19 halves height and width before `layer`, a name of `VGG19_LAYERS`."""
    return int(layer.removeprefix("relu").split("_")[0]) - 1


class VGG19Features(nn.Module):
    """VGG19 (Simonyan & Zisserman, 2015) up to the deepest ReLU asked for, with torchvision's parameter names and no gradients for them.

    Args:
        weights: "imagenet": torchvision's, from the file the environment variable `VCD_FAST_VGG19` names, a cache or a download; a path to
            a .safetensors or .pth file with torchvision's names; or "random": fixed random weights, with a warning.
        layers: ReLU outputs to return, "relu1_1" to "relu5_4".

    Attributes:
        weight_file: where the weights came from, and their SHA-256.
        minimum_size: least height and width in pixels (16 for relu5_1).

    Raises:
        FileNotFoundError, ValueError: see `vcd_fast.weights.load_vgg19`; unknown layer.
    """

    weight_file: WeightFile
    minimum_size: int

    def __init__(self, weights: str | Path = "imagenet", *, layers: Sequence[str] = VCD_LAYERS) -> None:
        super().__init__()
        if unknown := [name for name in layers if name not in VGG19_LAYERS]:
            raise ValueError(
                f"layers: expected names from {VGG19_LAYERS[0]} to {VGG19_LAYERS[-1]}, got {', '.join(unknown)}"
            )
        self._build(layers)
        shapes = {key: value.shape for key, value in self.state_dict().items()}
        state, self.weight_file = load_vgg19(weights, shapes)
        self.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval()

    @classmethod
    def without_weights(cls, layers: Sequence[str] = VCD_LAYERS) -> VGG19Features:
        """The network on the meta device, for counting what it needs."""
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network._build(layers)
        return network.requires_grad_(False).eval()

    def _build(self, layers: Sequence[str]) -> None:
        layout = _vgg19_layout()
        depth = 1 + max(i for i, (name, _, _) in enumerate(layout) if name in layers)
        self.layers = tuple(name for name, _, _ in layout[:depth] if name in layers)
        self.names = tuple(name for name, _, _ in layout[:depth])
        self.minimum_size = 2 ** sum(name.startswith("pool") for name in self.names)
        modules = []
        with torch.device("meta"):
            for name, fan_in, fan_out in layout[:depth]:
                if name.startswith("conv"):
                    modules.append(nn.Conv2d(fan_in, fan_out, 3, padding=1))
                else:
                    modules.append(nn.ReLU(inplace=True) if name.startswith("relu") else nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*modules)
        self._statistics: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W] in [0, 1], of the module's dtype -> {"relu1_1": [B, 64, H, W], "relu2_1": [B, 128, H//2, W//2], …}."""
        mean, std = self._mean_and_std(images)
        x = (images - mean) / std
        found = {}
        for name, module in zip(self.names, self.features, strict=True):
            x = frozen_conv(x, module.weight, module.bias, padding=(1,)) if isinstance(module, nn.Conv2d) else module(x)
            if name in self.layers:
                found[name] = x
        return found

    def _mean_and_std(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """ImageNet's, [3, 1, 1] each; not buffers, which a change of the module's dtype and back would round."""
        key = (images.device, images.dtype)
        if key not in self._statistics:
            self._statistics[key] = tuple(
                torch.tensor(values, device=images.device, dtype=images.dtype).view(3, 1, 1)
                for values in (IMAGENET_MEAN, IMAGENET_STD)
            )
        return self._statistics[key]
