"""The fixed side of a comparison: the condition's values, projected and sorted once, used for every frame.

Lists in half form (see `lists`) hold the sorted values of the representatives and those of the self-conjugate bins. The full sorted list
is `merge(repeat(representatives, 2), self_conjugate)` for even ones; for odd ones the representatives hold |v| and the list is
`merge([-representatives reversed, representatives], self_conjugate)`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vcd_fast.distance.backends.rows import sort_values
from vcd_fast.distance.config import SlicingConfig
from vcd_fast.distance.lists import Lists, projected_lists
from vcd_fast.distance.projections import draw_projections, given_projections


@dataclasses.dataclass(frozen=True, eq=False)
class SortedTarget:
    """What `sort_target` returns: the sorted lists of a batch of feature maps, with the directions and options they belong to."""

    parts: tuple[Lists, ...]
    """ascending, in the order of `config.parts`; odd representatives hold |v|"""
    projections: Tensor | None
    """[K, C·k·k]; None in the flat reading"""
    config: SlicingConfig
    shape: tuple[int, int, int]
    """channels, height, width of the feature maps"""

    @property
    def batch_size(self) -> int:
        return self.parts[0].representatives.shape[0]

    @property
    def device(self) -> torch.device:
        return self.parts[0].representatives.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].representatives.dtype

    @property
    def nbytes(self) -> int:
        tensors = [t for part in self.parts for t in (part.representatives, part.self_conjugate)]
        tensors += [] if self.projections is None else [self.projections]
        return sum(t.nbytes for t in tensors)

    def to(self, device: torch.device | str) -> SortedTarget:
        parts = tuple(Lists(p.representatives.to(device), p.self_conjugate.to(device), p.form) for p in self.parts)
        projections = None if self.projections is None else self.projections.to(device)
        return dataclasses.replace(self, parts=parts, projections=projections)

    def __getitem__(self, samples: slice) -> SortedTarget:
        """The same for some samples of the batch."""
        parts = tuple(Lists(p.representatives[samples], p.self_conjugate[samples], p.form) for p in self.parts)
        return dataclasses.replace(self, parts=parts)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_features(x: Tensor, argument: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{argument}: expected floating-point numbers, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{argument}: expected shape [batch, channels, height, width], got {list(x.shape)}")


def sort_target(
    y: Tensor,
    projections: Tensor | None = None,
    *,
    config: SlicingConfig | None = None,
    layer: str = "",
    **options: object,
) -> SortedTarget:
    """The fixed side of `sliced_wasserstein`, computed once: features, spectrum, projections, sorted lists.

    Args:
        y: [B, C, H, W] feature maps, any floating-point dtype; no gradient flows to them.
        projections: [K, C] ([K, C, k, k] in the patch reading) directions in place of drawn ones; used as they are.
        config: options as one object; `options`: its fields by name.
        layer: name that enters the drawing of directions beside the seed.

    Returns:
        Lists in float32 (float64 for float64 input), in half form where the spectrum allows it: 4·(m + s) bytes per direction, part
        and sample, with m + s about H·W/2.

    Raises:
        TypeError, ValueError: wrong type, shape or option; a map smaller than the patch.
    """
    check_features(y, "y")
    try:
        config = dataclasses.replace(config or SlicingConfig(), **options)
    except TypeError as error:
        if config is not None and not isinstance(config, SlicingConfig):
            raise
        names = [field.name for field in dataclasses.fields(SlicingConfig)]
        if set(options) <= set(names):
            raise
        raise TypeError(f"unknown option: expected one of {', '.join(names)}, got {', '.join(options)}") from error
    channels, height, width = y.shape[1:]
    patch = config.patch_size if config.slicing == "patch" else None
    if patch and min(height, width) < patch:
        raise ValueError(
            f"y{f' ({layer})' if layer else ''}: expected feature maps of at least {patch}×{patch} for patches of that size, got "
            f"{height}×{width}; use larger images, fewer layers or a smaller patch_size"
        )
    if config.slicing == "flat":
        if projections is not None:
            raise ValueError("projections: expected None in the flat reading, which projects nothing")
    else:
        if projections is None:
            projections = draw_projections(config.seed, layer, config.num_projections, channels, patch or 1)
        else:
            projections = given_projections(projections, channels, patch, "projections")
            config = dataclasses.replace(config, num_projections=len(projections))
        projections = projections.to(y.device, compute_dtype(y))
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        lists = projected_lists(y.detach().to(compute_dtype(y)), config, projections)
    parts = []
    for values, alone, form in lists:
        values = values.abs() if form == "odd" else values
        parts.append(Lists(sort_values(values), sort_values(alone), form))
    return SortedTarget(tuple(parts), projections, config, (channels, height, width))
