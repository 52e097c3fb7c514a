"""The Video Consistency Distance as a function and as a module (arXiv 2510.19193, Eq. 2).

    VCD(x_cnd, x_i) = (N - i + 1)/N · Σ_layers [ W(A_cnd, A_i) + W(P_cnd, P_i) ]

with A and P the amplitude and phase of the FFT of VGG19 feature maps, W the sliced Wasserstein distance, i = 1…N the frames of the clip
and x_cnd = x_1 the conditioning image.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vcd_fast.distance.backends import check_backend
from vcd_fast.distance.config import VCDConfig, resolve_config
from vcd_fast.distance.euclidean import EuclideanTarget, euclidean_target, euclidean_terms
from vcd_fast.distance.features import FeatureExtractor, VGG19Features
from vcd_fast.distance.projections import draw_projections
from vcd_fast.distance.sliced import sliced_terms
from vcd_fast.distance.streaming import streamed
from vcd_fast.distance.target import SortedTarget, sort_target
from vcd_fast.distance.validation import check_condition, check_video, frame_positions
from vcd_fast.weights import VGG19_VARIABLE

Reduction = Literal["mean", "sum", "none"]
CHUNK_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 19}
"""Pixels evaluated at once unless `chunk_frames` says otherwise: a 272×368 frame on a CPU, five on a GPU."""


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """The condition's side of the distance: what `VCDLoss.prepare` computes once and a caller keeps as long as it is useful."""

    layers: Mapping[str, SortedTarget | EuclideanTarget]
    config: VCDConfig
    image_size: tuple[int, int]
    """height and width in pixels"""

    @property
    def batch_size(self) -> int:
        return next(iter(self.layers.values())).batch_size

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).device

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def to(self, device: torch.device | str) -> Target:
        return dataclasses.replace(self, layers={name: layer.to(device) for name, layer in self.layers.items()})

    def __getitem__(self, samples: slice) -> Target:
        """The same for some images of the batch."""
        return dataclasses.replace(self, layers={name: layer[samples] for name, layer in self.layers.items()})


class VCDDetails(NamedTuple):
    """Every term of a distance, detached. T counts the frames compared: the condition's own is left out."""

    terms: Tensor
    """[B, T, L, P] per frame, layer and part, before any weight"""
    weights: Tensor
    """[T] temporal weights"""
    per_frame: Tensor
    """[B, T], all weights applied; their mean over T is `loss`"""
    loss: Tensor
    """[B]"""
    layers: tuple[str, ...]
    parts: tuple[str, ...]
    """"amplitude", "phase", or "feature"; a part of weight 0 is not computed"""
    frame_index: tuple[int, ...]
    """0-based positions of the T frames in the clip"""


def _untraced(method: Callable) -> Callable:
    """`method` as a graph break for torch.compile; the decorator PyTorch has for it would import its compiler, and Triton, right away."""
    disabled = None

    @functools.wraps(method)
    def call(*args: object, **kwargs: object) -> object:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return call


class VCDLoss(nn.Module):
    """The Video Consistency Distance of videos to their conditioning images; smaller is more consistent.

        loss = VCDLoss()                              # the paper's; VCDLoss("vcd_amp"), VCDLoss(p=2, seed=1), …
        loss(video, image).backward()                 # video [B, T, 3, H, W] in [0, 1], image [B, 3, H, W]

    The gradient with respect to the video is computed in the forward, a few frames at a time, and is the only thing kept: memory does
    not grow with the number of frames beyond the video's own size. It can be taken once. Under autocast everything is computed in the
    extractor's dtype, and the FFT, sort and sum in at least float32. No gradient flows to the condition or to the extractor. To torch.compile the
    call is a graph break.

    Args:
        config: a preset's name (see `PRESETS`) or a `VCDConfig`; `changes` replace fields of it.
        extractor: "vgg19" (ImageNet weights, see `VGG19Features`) or anything that follows `FeatureExtractor`.
        projections: {layer: [K, C] or [K, C, k, k]} directions in place of drawn ones, used as they are.
        backend: "auto", "reference", "simd" or "triton"; "auto" obeys the environment variable `VCD_FAST_BACKEND`.
        chunk_frames: images evaluated at once; None: as many as `CHUNK_PIXELS` allows, at least one.
        check_range: whether to look for values outside [0, 1]; None: on the CPU only, because it would synchronise a GPU.

    Raises:
        TypeError, ValueError: unknown preset, option or layer. FileNotFoundError: no weights, see `vcd_fast.weights.resolve`.
    """

    def __init__(
        self,
        config: str | VCDConfig = "vcd",
        *,
        extractor: str | FeatureExtractor = "vgg19",
        projections: Mapping[str, Tensor] | None = None,
        backend: str = "auto",
        chunk_frames: int | None = None,
        check_range: bool | None = None,
        **changes: object,
    ) -> None:
        super().__init__()
        self.config = resolve_config(config, changes)
        if isinstance(extractor, str):
            if extractor != "vgg19":
                raise ValueError(
                    f"extractor: expected 'vgg19' or a callable from images to feature maps, got {extractor!r}"
                )
            extractor = VGG19Features(layers=self.config.layers)
        elif not callable(extractor):
            raise TypeError(f"extractor: expected 'vgg19' or a callable, got {type(extractor).__name__}")
        if projections is not None and (missing := set(self.config.layers) - set(projections)):
            raise ValueError(
                f"projections: expected directions for every layer, got none for {', '.join(sorted(missing))}"
            )
        if chunk_frames is not None and (not isinstance(chunk_frames, int) or chunk_frames < 1):
            raise ValueError(f"chunk_frames: expected a whole number of at least 1, got {chunk_frames!r}")
        check_backend(backend)
        self.extractor = extractor
        self.backend = backend
        self.chunk_frames = chunk_frames
        self.check_range = check_range
        self._given = None if projections is None else dict(projections)
        self._drawn: dict[tuple, Tensor] = {}

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}"

    @_untraced
    def forward(
        self,
        video: Tensor,
        condition: Tensor | Target | None = None,
        *,
        frame_index: Sequence[int] | Tensor | None = None,
        num_frames: int | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The distance of each frame but the condition's own, weighted in time.

        Args:
            video: [B, T, 3, H, W] floating point in [0, 1]: all frames of the clips, or those at `frame_index`.
            condition: [B, 3, H, W] in [0, 1] (or [1, 3, H, W] for all clips), or what `prepare` made of it; None: the clip's own first
                frame (that at `condition_frame`), detached.
            frame_index: [T] 0-based positions of the frames in clips of `num_frames` frames.
            num_frames: N of the formula; needed with `frame_index`.
            reduction: "mean" over clips and frames, "sum" over both, or "none": [B, T'] with T' the frames compared, in order.

        Returns:
            float32 (float64 if the extractor's parameters are).

        Raises:
            TypeError, ValueError: wrong type, shape, size, range, device; fewer than two frames; no frame but the condition's own.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        per_frame, _, _, _ = self._evaluate(video, condition, frame_index, num_frames)
        return per_frame if reduction == "none" else getattr(per_frame, reduction)()

    def details(
        self,
        video: Tensor,
        condition: Tensor | Target | None = None,
        *,
        frame_index: Sequence[int] | Tensor | None = None,
        num_frames: int | None = None,
    ) -> VCDDetails:
        """Every term of the distance, without gradient; arguments as for the call."""
        with torch.no_grad():
            per_frame, terms, weights, kept = self._evaluate(video, condition, frame_index, num_frames)
        return VCDDetails(terms, weights, per_frame, per_frame.mean(1), self.config.layers, self.config.parts, kept)

    def prepare(self, condition: Tensor) -> Target:
        """The condition's side, computed once: features, spectrum, sorted projections, in half form (see `target`).

        Args:
            condition: [B, 3, H, W] floating point in [0, 1].

        Raises:
            TypeError, ValueError: as for the call.
        """
        check_condition(condition, self._minimum_size(), self.check_range)
        with torch.no_grad(), torch.autocast(condition.device.type, enabled=False):
            layers = {
                name: self._fixed_side(name, y) for name, y in self._features(condition.detach(), "condition").items()
            }
        return Target(layers, self.config, tuple(condition.shape[-2:]))

    def frames_at_once(self, device: torch.device, height: int, width: int) -> int:
        """Images of this size that are evaluated at once on `device`: `chunk_frames`, or what `CHUNK_PIXELS` allows."""
        return self.chunk_frames or max(1, CHUNK_PIXELS.get(device.type, CHUNK_PIXELS["cuda"]) // (height * width))

    def _evaluate(
        self,
        video: Tensor,
        condition: Tensor | Target | None,
        frame_index: Sequence[int] | Tensor | None,
        num_frames: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """-> per_frame [B, T'] with its graph, terms [B, T', L, P], temporal weights [T'], positions of the frames."""
        check_video(video, self._minimum_size(), self.check_range)
        positions, num_frames = frame_positions(video.shape[1], frame_index, num_frames)
        own = self.config.condition_position(num_frames)
        kept = [t for t, position in enumerate(positions) if position != own]
        if not kept:
            raise ValueError(
                f"frame_index: expected a frame other than the condition's own, {own}, got {list(positions)}"
            )
        if condition is None:
            if own not in positions:
                raise ValueError(f"condition: expected an image, because frame {own} is not among the frames given")
            condition = video[:, positions.index(own)].detach()
        target = condition if isinstance(condition, Target) else self.prepare(condition)
        self._check_target(video, target)
        contiguous = kept == list(range(kept[0], kept[-1] + 1))
        every = video.unbind(1)  # a list of positions would be an index that is copied to the device
        frames = video[:, kept[0] : kept[-1] + 1] if contiguous else torch.stack([every[t] for t in kept], 1)
        shared = target.batch_size == 1 and len(frames) > 1
        loss, terms = streamed(
            frames.flatten(0, 1).unsqueeze(0) if shared else frames,
            lambda images, clips: self._image_terms(images, target[clips]),
            self.chunk_frames
            or max(1, CHUNK_PIXELS.get(video.device.type, 1 << 19) // (video.shape[-1] * video.shape[-2])),
        )
        loss, terms = (t.reshape(len(frames), len(kept), *t.shape[2:]) for t in (loss, terms))
        index = tuple(positions[t] for t in kept)
        # filled on the device: a copy from the host cannot be captured in a CUDA graph
        weights = torch.cat([loss.new_full((1,), self.config.weight_of(t, num_frames)) for t in index])
        return loss * weights, terms, weights, index

    def _image_terms(self, images: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """images [n, 3, H, W] -> distance of each over all layers [n], and terms [n, L, P]."""
        totals, terms = [], []
        for name, x in self._features(images, "video").items():
            fixed = target.layers[name]
            if isinstance(fixed, EuclideanTarget):
                total, term = euclidean_terms(x, fixed)
            else:
                total, term = sliced_terms(x, fixed, self.backend)
            totals.append(total)
            terms.append(term)
        total = torch.stack(totals, -1)
        return total.mean(-1) if self.config.layer_reduction == "mean" else total.sum(-1), torch.stack(terms, -2)

    def _features(self, images: Tensor, argument: str) -> dict[str, Tensor]:
        parameter = next((p for p in getattr(self.extractor, "parameters", tuple)() if p.is_floating_point()), None)
        if parameter is not None:
            if parameter.device != images.device:
                raise ValueError(
                    f"{argument}: expected to be on the device of the loss, {parameter.device}, got {images.device}; move one with .to()"
                )
            images = images.to(parameter.dtype)
        found = self.extractor(images)
        if missing := [name for name in self.config.layers if name not in found]:
            raise ValueError(f"layers: expected some of the extractor's, {', '.join(found)}, got {', '.join(missing)}")
        return {name: found[name] for name in self.config.layers}

    def _fixed_side(self, name: str, y: Tensor) -> SortedTarget | EuclideanTarget:
        config = self.config.slicing_config
        if self.config.distance == "l2":
            return euclidean_target(y, config)
        return sort_target(y, self._directions(name, y), config=config, layer=name)

    def _directions(self, name: str, y: Tensor) -> Tensor | None:
        """The layer's directions on the device of y, drawn once."""
        config = self.config
        if config.slicing == "flat":
            return None
        patch = config.patch_size if config.slicing == "patch" else 1
        key = (name, y.shape[1], y.device)
        if key not in self._drawn:
            if self._given is not None:
                drawn = self._given[name]
            else:
                drawn = draw_projections(config.seed, name, config.num_projections, y.shape[1], patch)
                drawn = drawn.unflatten(1, (y.shape[1], patch, patch))
            self._drawn[key] = drawn.to(y.device)
        return self._drawn[key]

    def _minimum_size(self) -> int:
        return getattr(self.extractor, "minimum_size", 1)

    def _check_target(self, video: Tensor, target: Target) -> None:
        if target.config != self.config:
            raise ValueError(
                f"condition: prepared by a loss with other options: expected {self.config}, got {target.config}"
            )
        if target.device != video.device:
            raise ValueError(
                f"condition: expected to be on the device of the video, {video.device}, got {target.device}"
            )
        if target.image_size != tuple(video.shape[-2:]):
            height, width = target.image_size
            raise ValueError(
                f"condition: expected the height and width of the video, {video.shape[-2]}×{video.shape[-1]}, got {height}×{width}; "
                "resize one of them"
            )
        if target.batch_size not in (1, len(video)):
            raise ValueError(
                f"condition: expected batch size 1 or that of the video, {len(video)}, got {target.batch_size}"
            )


@functools.lru_cache(maxsize=2)
def _shared_vgg19(
    layers: tuple[str, ...], device: torch.device, dtype: torch.dtype, named: str | None
) -> VGG19Features:
    return VGG19Features(layers=layers).to(device, dtype)


@_untraced
def vcd_loss(
    video: Tensor,
    condition: Tensor | Target | None = None,
    *,
    frame_index: Sequence[int] | Tensor | None = None,
    num_frames: int | None = None,
    reduction: Reduction = "mean",
    config: str | VCDConfig = "vcd",
    extractor: str | FeatureExtractor = "vgg19",
    **options: object,
) -> Tensor:
    """The Video Consistency Distance in one call: `VCDLoss(config, …)(video, condition, …)`, on the video's device. A graph break to torch.compile.

    VGG19 stays in memory between calls (the two used last); a float64 video is computed in float64. Whoever calls it with the same
    image or options again and again does better with a `VCDLoss`.
    """
    if isinstance(extractor, str) and extractor == "vgg19" and isinstance(video, Tensor):
        dtype = torch.float64 if video.dtype == torch.float64 else torch.float32
        layers = resolve_config(config, {k: v for k, v in options.items() if k == "layers"}).layers
        extractor = _shared_vgg19(layers, video.device, dtype, os.environ.get(VGG19_VARIABLE))
    loss = VCDLoss(config, extractor=extractor, **options)
    return loss(video, condition, frame_index=frame_index, num_frames=num_frames, reduction=reduction)
