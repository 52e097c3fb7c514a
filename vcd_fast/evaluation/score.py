"""The distance of one video to its image, frame by frame and layer by layer: numbers, a file of them, a plot."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vcd_fast.distance import VCDLoss
from vcd_fast.media.files import replace_file
from vcd_fast.version import __version__

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class Score:
    """What was measured. T counts the frames compared: the condition's own is left out."""

    frame_index: tuple[int, ...]
    """0-based positions of the T frames in the video"""
    layers: tuple[str, ...]
    parts: tuple[str, ...]
    """"amplitude" and "phase", or "feature"; those of weight 0 are not computed"""
    terms: Tensor
    """[T, L, P] per frame, layer and part, before any weight"""
    weights: Tensor
    """[T] temporal weights"""
    per_frame: Tensor
    """[T], all weights applied"""
    seconds: Mapping[str, float]
    """"condition" and "frames": time spent on either"""

    @property
    def total(self) -> float:
        """The Video Consistency Distance: the mean of `per_frame`."""
        return self.per_frame.mean().item()

    def of_frames(self, part: str) -> list[float]:
        """A part of every frame, summed over layers."""
        return self.terms[..., self.parts.index(part)].sum(1).tolist()

    def of_layers(self, part: str) -> list[float]:
        """A part of every layer, averaged over frames."""
        return self.terms[..., self.parts.index(part)].mean(0).tolist()


def choose_frames(num_frames: int, *, frames: int | None = None, every: int | None = None) -> tuple[int, ...]:
    """0-based frames of a video to look at, frame 0 always among them.

    Args:
        num_frames: frames of the video. frames: how many besides the first, evenly spaced and including the last. every: the distance
            between them.

    Raises:
        ValueError: both given, or either below 1.
    """
    if frames is not None and every is not None:
        raise ValueError("frames and every: expected one of them, got both")
    for name, value in (("frames", frames), ("every", every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if every is not None:
        return tuple(range(0, num_frames, every))
    if frames is None or frames >= num_frames - 1:
        return tuple(range(num_frames))
    return (0, *(round(i * (num_frames - 1) / frames) for i in range(1, frames + 1)))


def score_video(
    loss: VCDLoss,
    video: Tensor,
    image: Tensor | None = None,
    *,
    frame_index: Sequence[int] | None = None,
    num_frames: int | None = None,
    on_frames: Callable[[int], None] | None = None,
) -> Score:
    """Score a video against its image.

    Args:
        loss: the distance; decides the device.
        video: [T, 3, H, W] in [0, 1]: all frames, or those at `frame_index` of `num_frames`. They may lie on the CPU whatever the
            device: frames are moved a few at a time.
        image: [3, H, W] in [0, 1]; None: the video's own first frame.
        on_frames: called with the number of frames after each few are done.

    Raises:
        TypeError, ValueError: see `VCDLoss`.
    """
    index = tuple(range(len(video))) if frame_index is None else tuple(frame_index)
    num_frames = len(video) if num_frames is None else num_frames
    own = loss.config.condition_position(num_frames) if num_frames > 1 else 0
    kept = [t for t, position in enumerate(index) if position != own]
    if not kept:
        raise ValueError(f"video: expected at least two frames, one besides the condition's, got {len(video)}")
    if image is None:
        if own not in index:
            raise ValueError(f"image: expected one, because frame {own} is not among the frames scored")
        image = video[index.index(own)]
    device = next((p.device for p in loss.parameters()), video.device)
    started = time.perf_counter()
    target = loss.prepare(image.unsqueeze(0).to(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    prepared = time.perf_counter()
    found = []
    step = loss.frames_at_once(device, *video.shape[-2:])
    for start in range(0, len(kept), step):
        some = kept[start : start + step]
        frames = video[some].unsqueeze(0).to(device)
        details = loss.details(frames, target, frame_index=[index[t] for t in some], num_frames=num_frames)
        found.append([t.cpu() for t in (details.terms[0], details.weights, details.per_frame[0])])
        if on_frames:
            on_frames(len(some))
    terms, weights, per_frame = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    seconds = {"condition": prepared - started, "frames": time.perf_counter() - prepared}
    return Score(
        tuple(index[t] for t in kept), loss.config.layers, loss.config.parts, terms, weights, per_frame, seconds
    )


def as_json(score: Score, *, fps: float | None, about: Mapping[str, object]) -> str:
    """Everything as one JSON object: `about` (what was scored and how), versions, the total and every term of every frame."""
    frames = [
        {
            "frame": frame,
            "seconds": None if fps is None else frame / fps,
            "weight": score.weights[t].item(),
            "vcd": score.per_frame[t].item(),
            "terms": {
                layer: dict(zip(score.parts, score.terms[t, i].tolist(), strict=True))
                for i, layer in enumerate(score.layers)
            },
        }
        for t, frame in enumerate(score.frame_index)
    ]
    content = {
        "vcd": score.total,
        **about,
        "versions": {"vcd_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": dict(score.seconds),
        "layers": {
            layer: {part: score.of_layers(part)[i] for part in score.parts} for i, layer in enumerate(score.layers)
        },
        "frames": frames,
    }
    return json.dumps(content, indent=1, allow_nan=True) + "\n"


def write_json(path: Path, content: str) -> None:
    """`content` as the file `path`, whole or not at all."""
    replace_file(path, io.BytesIO(content.encode()))


def check_plot_path(path: Path) -> None:
    """Raise ValueError unless `write_plot` knows the suffix of `path`."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(f"plot: expected a suffix among {', '.join(PLOT_SUFFIXES)}, got {str(path)!r}")


def write_plot(path: Path, score: Score, *, title: str) -> None:
    """A row per part: its course over the frames, and how the layers share it. PNG, SVG or PDF by the suffix of `path`.

    Raises:
        ValueError: another suffix. OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    check_plot_path(path)
    colours = {"amplitude": "tab:blue", "phase": "tab:orange", "feature": "tab:green"}
    figure = Figure(figsize=(9, 1 + 2.6 * len(score.parts)), dpi=120, layout="constrained")
    axes = figure.subplots(len(score.parts), 2, squeeze=False, width_ratios=(3, 2))
    figure.suptitle(f"{title}\nVideo Consistency Distance {score.total:.4g}", fontsize=11)
    marker = "o" if len(score.frame_index) <= 60 else None
    for (course, share), part in zip(axes, score.parts, strict=True):
        colour = colours[part]
        course.plot(score.frame_index, score.of_frames(part), color=colour, marker=marker, markersize=3.5)
        course.set_ylabel(f"{part} distance\n(sum over layers)")
        highest = max(filter(math.isfinite, score.of_frames(part)), default=0)
        course.set_ylim(0, 1.08 * highest or 1)
        course.xaxis.get_major_locator().set_params(integer=True)
        course.grid(alpha=0.3)
        share.bar(score.layers, score.of_layers(part), color=colour)
        share.set_ylabel("mean over frames")
        share.tick_params(axis="x", labelrotation=30)
        share.grid(axis="y", alpha=0.3)
    axes[-1, 0].set_xlabel("frame (0 is the condition), before the temporal weight")
    axes[-1, 1].set_xlabel("layer")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    replace_file(path, buffer)
