"""The memory of the Video Consistency Distance: VGG19 as it runs, on the meta device; the distance itself by what its kernels allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcd_fast.distance import VGG19Features
from vcd_fast.distance.backends.triton_fused import CHUNK_VALUES
from vcd_fast.distance.features import VGG19_BLOCKS, pools_before
from vcd_fast.distance.vcd import CHUNK_PIXELS
from vcd_fast.rewards.base import RewardInput, RewardOutput
from vcd_fast.rewards.vcd import VCDRewardSettings

SCRATCH = 40
"""bytes per projected value of a chunk of directions, on a GPU (see `CHUNK_VALUES`)"""
SORTING = 32
"""bytes per value at the peak of torch.sort, indices included"""
REFERENCE_KEPT, REFERENCE_PEAK = 12, 36
"""bytes per projected value that plain PyTorch keeps for the backward, and at its peak"""


class CountedReward:
    """Stands in for `VCDReward` on the meta device: allocates what it allocates. Its values mean nothing."""

    def __init__(self, settings: VCDRewardSettings) -> None:
        self.settings = settings
        self.config = settings.config
        self._network = VGG19Features.without_weights(self.config.layers)

    @property
    def weights(self) -> list[Tensor]:
        return list(self._network.parameters())

    @property
    def directions(self) -> int:
        """Numbers of all directions."""
        if self.config.slicing == "flat" or self.config.distance == "l2":
            return 0
        patch = self.config.patch_size**2 if self.config.slicing == "patch" else 1
        widths = [VGG19_BLOCKS[pools_before(name)][0] for name in self.config.layers]
        return sum(widths) * patch * self.config.num_projections

    def to(self, device: torch.device | str) -> CountedReward:
        return self

    def frames_wanted(self, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        """Those that cost most to decode: the last one, the others as far apart as they can be."""
        wanted, last = self.settings.frames_per_step, num_frames - 1
        return torch.tensor(sorted(last - i * last // wanted for i in range(wanted)))

    def __call__(self, inputs: RewardInput) -> RewardOutput:
        with torch.no_grad():
            target = [self._target(y) for y in self._network(inputs.image).values()]
        frames = inputs.video.detach().flatten(0, 1)
        height, width = frames.shape[-2:]
        at_once = self.settings.chunk_frames or max(1, CHUNK_PIXELS["cuda"] // (height * width))
        gradient = torch.empty_like(frames)
        for first in range(0, len(frames), at_once):
            images = frames[first : first + at_once].requires_grad_()
            with torch.enable_grad():
                terms = [_Distance.apply(x, self) for x in self._network(images).values()]
                (piece,) = torch.autograd.grad(torch.stack(terms).sum(), images)
            gradient[first : first + at_once] = piece
            del images, terms, piece
        del target
        surrogate = (inputs.video * gradient.view_as(inputs.video)).flatten(1).sum(1)
        return RewardOutput(surrogate, {})

    def _values(self, x: Tensor, samples: int) -> int:
        """Projected values of a part and layer, in half form."""
        count = x.shape[1] if self.config.slicing == "flat" else self.config.num_projections
        return samples * count * (x.shape[-2] * x.shape[-1] // 2 + 4)

    @property
    def _by_kernels(self) -> bool:
        """As `backend="auto"` decides on a GPU."""
        kernels = self.config.domain == "frequency" and self.config.slicing == "channel"
        return kernels and self.settings.backend != "reference"

    def _target(self, y: Tensor) -> list[Tensor]:
        """The condition's lists; made by sorting all directions of a part at once."""
        if self.config.distance == "l2":
            return [torch.empty_like(y) for _ in self.config.parts]
        values, spectrum = self._values(y, len(y)), _spectrum(y)
        projected = [_bytes(y, 4 * values) for _ in self.config.parts]
        lists = []
        for _ in self.config.parts:
            scratch = _bytes(y, (SORTING - 4) * values)
            lists.append(_bytes(y, 4 * values))
            del scratch
        del projected, spectrum
        return lists

    def compare(self, x: Tensor) -> list[Tensor]:
        """Allocate what comparing the maps x [n, C, H, W] needs; returns what is kept until the backward."""
        spectrum = _spectrum(x)
        if self.config.distance == "l2":
            return [spectrum, torch.empty_like(spectrum)]
        values = self._values(x, len(x))
        if not self._by_kernels:
            parts = 2 * len(self.config.parts)  # whole lists
            scratch = _bytes(x, (REFERENCE_PEAK - REFERENCE_KEPT) * values * parts)
            kept = _bytes(x, REFERENCE_KEPT * values * parts)
            del scratch
            return [spectrum, kept]
        of_spectrum = torch.empty_like(spectrum)
        scratch = _bytes(x, SCRATCH * min(values, CHUNK_VALUES))
        del scratch, spectrum
        copied, gradient = torch.empty_like(of_spectrum), torch.empty_like(x)  # the inverse FFT and its input
        del copied
        return [gradient]


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reward: CountedReward) -> Tensor:
        ctx.save_for_backward(*reward.compare(x), x.new_empty(0))
        ctx.shape = x.shape
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.new_empty(ctx.shape), None


def _spectrum(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 + 1), dtype=torch.complex64)


def _bytes(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.uint8)
