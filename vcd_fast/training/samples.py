"""Held-out pictures while training: videos one can watch, and the distance at a noise that never changes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vcd_fast.media import frame_strip, read_video, write_image, write_video
from vcd_fast.models.base import Condition, I2VModel
from vcd_fast.rewards.vcd import VCDReward
from vcd_fast.rollout.generate import generate

FOLDER = "samples"
BASE = "base"


@dataclasses.dataclass(frozen=True)
class HeldOutClip:
    """A picture, its prompt and one noise."""

    name: str
    condition: Condition
    image: Tensor
    """[3, H, W] in [0, 1]"""
    noise_seed: int


class HeldOut:
    """Generates the same clips again and again: same pictures, same noise, another LoRA."""

    def __init__(
        self, clips: Sequence[HeldOutClip], model: I2VModel, reward: VCDReward, sampling_steps: int, output: Path
    ):
        self.clips = list(clips)
        self.model = model
        self.reward = reward
        self.sampling_steps = sampling_steps
        self.folder = output / FOLDER

    def has(self, name: str) -> bool:
        """Whether `evaluate(name)` has already written every clip."""
        return all((self.folder / name / f"{clip.name}.mp4").exists() for clip in self.clips)

    def evaluate(
        self, name: str, forward: Callable[..., object], on_clip: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Generate every clip with the weights as they are; write `samples/NAME/CLIP.mp4` and a strip beside the base model's.

        Collective. Ranks share the clips; under ZeRO-3 every rank has to run as many forwards as the others, so the last round is
        filled up with repetitions.

        Returns:
            the distance (VCD, smaller is better) by clip.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        rounds = -(-len(self.clips) // world)
        distances = torch.zeros(len(self.clips), dtype=torch.float64)
        failure: OSError | None = None
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(rounds):
            index = i * world + rank
            clip = self.clips[min(index, len(self.clips) - 1)]
            video = self._generate(clip, forward)
            if index < len(self.clips):
                image = clip.image[None, :, : video.shape[-2], : video.shape[-1]]  # as in `micro_step`
                distances[index] = self.reward.score(video, image).double().cpu().item()
                try:
                    self._write(folder, clip, video[0].cpu())
                except OSError as error:  # the other ranks are waiting in a collective; told of it below
                    failure = error
            if on_clip is not None:
                on_clip(i + 1, rounds)
        shared = torch.cat([distances, torch.tensor([float(failure is not None)])]).to(self.model.device)
        dist.all_reduce(shared)
        *values, failures = shared.tolist()
        if failure is not None:
            raise failure
        if failures:
            raise SystemExit(1)
        return {clip.name: value for clip, value in zip(self.clips, values, strict=True)}

    def _generate(self, clip: HeldOutClip, forward: Callable[..., object]) -> Tensor:
        generator = torch.Generator().manual_seed(clip.noise_seed)
        condition = clip.condition.to(self.model.device)
        return generate(self.model, condition, [generator], self.sampling_steps, forward=forward)

    def _write(self, folder: Path, clip: HeldOutClip, video: Tensor) -> None:
        if not torch.isfinite(video).all():
            warnings.warn(f"{clip.name}: the video is not finite, so there is nothing to show", stacklevel=2)
            return
        write_video(folder / f"{clip.name}.mp4", video, self.model.settings.fps)
        rows = [(folder.name, video)]
        base = self.folder / BASE / f"{clip.name}.mp4"
        if folder.name != BASE and base.exists():
            rows.insert(0, (BASE, read_video(base)[0]))
        write_image(folder / f"{clip.name}.png", frame_strip(rows, clip.image))
