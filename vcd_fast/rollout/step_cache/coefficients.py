"""Polynomials of the step cache: those that were published, which model each was fitted on, and files of one's own.

Wrong coefficients do not fail, they skip all or nothing: a model that is not known here is refused until `vcd calibrate` has fitted it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vcd_fast.rollout.step_cache.indicators import Mode

FORMAT = "vcd_fast step cache coefficients"
ENDS: Mapping[Mode, tuple[int, int]] = {"ret": (5, 0), "non-ret": (1, 1)}
"""steps that are always computed at both ends: in Wan the first five show no correlation of input with output (TeaCache)"""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """A fitted polynomial, highest power first, and how it is meant to be used."""

    name: str
    values: tuple[float, ...]
    mode: Mode
    """what was compared, see `indicators`"""
    source: str
    threshold: float | None = None
    """a default; None: the user has to choose"""


TEACACHE = "ali-vilab/TeaCache"
WAN, OPEN_SORA = f"{TEACACHE}, TeaCache4Wan2.1", f"{TEACACHE}, eval/teacache/experiments/opensora.py"
FUN = (
    f"{WAN}: the set of t2v 1.3B in retention mode, which aigc-apps/VideoX-Fun uses for Wan2.1-Fun-1.3B-InP at threshold 0.10; "
    "none was fitted on that model"
)

_T2V_1_3B = {
    "non-ret": (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    "ret": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
}

PUBLISHED: dict[tuple[str, Mode], Coefficients] = {
    (each.name, each.mode): each
    for each in (
        Coefficients("wan2.1-t2v-1.3b", _T2V_1_3B["non-ret"], "non-ret", WAN, 0.05),
        Coefficients("wan2.1-t2v-1.3b", _T2V_1_3B["ret"], "ret", WAN, 0.05),
        Coefficients("wan2.1-fun-1.3b", _T2V_1_3B["non-ret"], "non-ret", f"{WAN}: the set of t2v 1.3B", 0.05),
        Coefficients("wan2.1-fun-1.3b", _T2V_1_3B["ret"], "ret", FUN, 0.10),
        Coefficients(
            "wan2.1-t2v-14b",
            (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
            "non-ret",
            WAN,
            0.14,
        ),
        Coefficients(
            "wan2.1-t2v-14b",
            (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
            "ret",
            WAN,
        ),
        Coefficients(
            "wan2.1-i2v-14b-480p",
            (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
            "non-ret",
            WAN,
            0.13,
        ),
        Coefficients(
            "wan2.1-i2v-14b-480p",
            (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
            "ret",
            WAN,
            0.20,
        ),
        Coefficients(
            "wan2.1-i2v-14b-720p",
            (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
            "non-ret",
            WAN,
            0.18,
        ),
        Coefficients(
            "wan2.1-i2v-14b-720p",
            (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
            "ret",
            WAN,
        ),
        Coefficients(
            "open-sora-1.2",
            (2.17546007e02, -1.18329252e02, 2.68662585e01, -4.59364272e-02, 4.84426240e-02),
            "non-ret",
            OPEN_SORA,
            0.1,
        ),
    )
}


def shape_of(transformer: nn.Module) -> dict[str, Any]:
    """What tells one model of a class from another: class, width, depth, input channels."""
    config = dict(transformer.config)
    keys = ("num_layers", "num_attention_heads", "attention_head_dim", "hidden_size", "depth", "in_channels")
    return {"class": type(transformer).__name__, **{key: config[key] for key in keys if key in config}}


def published_name(transformer: nn.Module, weights: str | None = None) -> str | None:
    """The published set that belongs to a transformer, told by its shape and, where two models share one, by the name of its weights.

    Returns None where none does.
    """
    shape = shape_of(transformer)
    if shape["class"] == "STDiT3":
        return "open-sora-1.2" if (shape["hidden_size"], shape["depth"]) == (1152, 28) else None
    size = shape.get("num_layers"), shape.get("num_attention_heads")
    image_to_video = shape.get("in_channels") == 36
    if size == (30, 12):
        return "wan2.1-fun-1.3b" if image_to_video else "wan2.1-t2v-1.3b"
    if size == (40, 40) and not image_to_video:
        return "wan2.1-t2v-14b"
    if size == (40, 40):
        called = f"{weights or ''} {transformer.config.get('_name_or_path') or ''}".lower()
        found = [resolution for resolution in ("480p", "720p") if resolution in called]
        return f"wan2.1-i2v-14b-{found[0]}" if len(found) == 1 else None
    return None


def find(
    transformer: nn.Module, mode: Mode | None = None, named: str | None = None, weights: str | None = None
) -> Coefficients:
    """The coefficients to use with a transformer.

    Args:
        mode: None: `ret` where the model has a set for it, else the one it has.
        named: a published set, or a file of `vcd calibrate`; None: told by the transformer.
        weights: name of the transformer's weights, which tells 480p from 720p.

    Raises:
        ValueError: a model, name or mode without coefficients; a file that was calibrated on another model or in another mode.
        OSError: the file cannot be read.
    """
    if named is not None and named not in {name for name, _ in PUBLISHED}:
        return load(named, transformer, mode)
    name = named or published_name(transformer, weights)
    modes = [each for known, each in PUBLISHED if known == name]
    if name is None:
        raise ValueError(
            f"step cache: no coefficients are known for {_text(shape_of(transformer))}. Fit them with `vcd calibrate` and name its file "
            f"in rollout.cache_coefficients, or name there the set of a model that yours was made from: {', '.join(_names())}"
        )
    if mode is None:
        mode = "ret" if "ret" in modes else "non-ret"
    if mode not in modes:
        raise ValueError(f"step cache: {name} has coefficients for the mode {' and '.join(modes)}, not for {mode}")
    return PUBLISHED[name, mode]


def save(
    path: str | Path, transformer: nn.Module, values: tuple[float, ...], mode: Mode, facts: Mapping[str, Any]
) -> Path:
    """Write a fit as JSON, all of it or nothing."""
    path = Path(path)
    content = {"format": FORMAT, "model": shape_of(transformer), "mode": mode, "coefficients": list(values), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
    return path


def load(path: str | Path, transformer: nn.Module, mode: Mode | None = None) -> Coefficients:
    """Read a file that `save` wrote. Errors as of `find`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"rollout.cache_coefficients: expected a file of `vcd calibrate` or one of {', '.join(_names())}, got {str(path)!r}"
        )
    try:
        content = json.loads(path.read_text())
        known = content["format"] == FORMAT
        values = tuple(float(value) for value in content["coefficients"])
        fitted_mode, model = content["mode"], content["model"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a file of `vcd calibrate`: {type(error).__name__} {error}") from None
    if not known or fitted_mode not in ENDS or not values or not all(map(math.isfinite, values)):
        raise ValueError(f"{path}: expected a file of `vcd calibrate`")
    if model != shape_of(transformer):
        raise ValueError(f"{path}: was calibrated on {_text(model)}, not on {_text(shape_of(transformer))}")
    if mode not in (None, fitted_mode):
        raise ValueError(f"{path}: was calibrated in the mode {fitted_mode}, not {mode}")
    return Coefficients(path.stem, values, fitted_mode, f"calibrated: {path}")


def _names() -> list[str]:
    return sorted({name for name, _ in PUBLISHED})


def _text(shape: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "class" else f"{key} {value}" for key, value in shape.items())
