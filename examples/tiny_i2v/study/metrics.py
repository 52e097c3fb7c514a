"""What is asked of a video, beside the distance it may have been tuned on.

A frame is compared with the picture moved to where the frame was registered (`measure`), so that motion is no fault in itself; how much
of the motion asked for there is stands beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.tiny_i2v.measure import amount, measure, shows, warp
from examples.tiny_i2v.sample import Scene
from vcd_fast import VCDLoss, VGG19Features

LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
HIGHER_IS_BETTER = {
    "vcd": False,
    "psnr": True,
    "features": True,
    "flicker": False,
    "motion": True,
    "shown": True,
    "sharpness": True,
}


class Metrics:
    """Of videos [T, 3, H, W] in [0, 1] whose first frame was to be `scene.true[0]`.

    vcd: the distance of the preset `vcd`. psnr: dB of frames 1.. against the picture moved as they moved, where that is known. features:
    cosine of VGG19's features at every place (relu1_1 to relu5_1), the mean over places, layers and every other frame, against those of the
    picture so moved.
    flicker: 255 · mean |change of the difference to the moved picture| from frame to frame. motion: the part of the motion asked for (for
    stillness: what moved). shown: whether it is the motion named. sharpness: deviation of the Laplacian against the picture's.
    """

    def __init__(self, vgg19: str = "random", num_projections: int = 64) -> None:
        self.extractor = VGG19Features(vgg19)
        self.loss = VCDLoss("vcd", extractor=self.extractor, num_projections=num_projections)

    @torch.no_grad()
    def __call__(self, scene: Scene, video: Tensor) -> dict[str, float]:
        picture, found = scene.true[0], measure(video)
        moved, inside = (torch.stack(part) for part in zip(*(warp(picture, pose) for pose in found.poses), strict=True))
        difference = (video - moved) * inside[:, None]
        squared = difference[1:].square().sum((1, 2, 3)) / (3 * inside[1:].sum((1, 2))).clamp_min(1)
        both = (inside[1:] * inside[:-1])[:, None]
        change = ((difference[1:] - difference[:-1]).abs() * both).sum() / (3 * both.sum()).clamp_min(1)
        # outside what the picture shows nothing is known: both sides show the frame there
        filled = moved * inside[:, None] + video * (1 - inside[:, None])
        return {
            "vcd": float(self.loss(video[None], picture[None])),
            "psnr": float((-10 * squared.clamp_min(1e-8).log10()).mean()),
            "features": self._cosine(video[2::2], filled[2::2]),
            "flicker": 255 * float(change),
            "motion": amount(found, scene.motion),
            "shown": float(shows(found, scene.motion)),
            "sharpness": float(_laplacian(video[1:]).mean() / _laplacian(picture[None]).clamp_min(1e-6).mean()),
        }

    def _cosine(self, frames: Tensor, others: Tensor) -> float:
        both = self.extractor(torch.cat([frames, others]))
        cosines = []
        for features in both.values():
            first, second = features.chunk(2)
            cosines.append(F.cosine_similarity(first, second, dim=1).mean())
        return float(sum(cosines) / len(cosines))


def _laplacian(frames: Tensor) -> Tensor:
    """[T] standard deviation of the Laplacian of the grey frames."""
    return F.conv2d(frames.mean(1, keepdim=True), LAPLACE[None, None]).flatten(1).std(1)
