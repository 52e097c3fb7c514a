"""`vcd estimate`: peak memory of a run before it is started, and what makes it fit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vcd_fast.training.estimate import Estimate, Fit
    from vcd_fast.training.settings import RunConfig

# argparse, built from the settings themselves, reads what follows.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
DESCRIPTION = (
    "Peak GPU memory of a training run, from its options alone: nothing is loaded, no GPU is needed. What the driver takes and what an "
    "allocator wastes is allowed for, not counted."
)
NOTE = "`needed`: with half a GiB for the driver and a tenth (encoders: a quarter GiB) for what is not counted"


def estimate(context: typer.Context) -> None:
    """Peak memory of a run by phase and part, and what to turn on to fit; the options of `vcd train`, see `vcd estimate --help`."""
    from vcd_fast.training.estimate import estimate as count
    from vcd_fast.training.estimate import fits

    config, arguments = read_options(context.args)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"json: expected a file in an existing folder, got {arguments.json}")
    if arguments.gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {arguments.gpus}")
    found = count(config, arguments.gpus)
    advised = fits(config, arguments.gpus)
    _print(config, arguments.gpus, found, advised)
    if arguments.json is not None:
        from vcd_fast.evaluation.score import write_json

        write_json(arguments.json, as_json(config, arguments.gpus, found, advised))
        print(f"wrote {arguments.json}")


def read_options(words: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """The run that `words` describe; the published weights of the family unless they say otherwise.

    Raises:
        ValueError: see `vcd_fast.config.parse`; a size that is not WIDTHxHEIGHT.
    """
    from vcd_fast.config import parse
    from vcd_fast.models.base import FAMILIES, family

    short = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--preset", "--config", "--weights", "--frames", "--size", "--pictures"):
        short.add_argument(name)
    given, rest = short.parse_known_args(words)
    words = [*rest]
    for name in ("model", "preset", "config", "weights"):
        value = getattr(given, name)
        words += [f"--{name}", value] if value is not None else []
    if given.model in FAMILIES and given.preset is given.config is given.weights is None:
        words += ["--preset", family(given.model).DEFAULT_PRESET]
    if given.frames is not None:
        words += ["--num-frames", given.frames]
    if given.size is not None:
        width, height = _size(given.size)
        words += ["--width", width, "--height", height]
    words += ["--pictures", given.pictures or "."]  # a run cannot do without, this can
    return parse(words, "vcd estimate", DESCRIPTION, _add_options)


def _size(text: str) -> tuple[str, str]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"size: expected WIDTHxHEIGHT in pixels, for example 368x272, got {text!r}")
    return width, height


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("estimate")
    group.add_argument("--gpus", type=int, default=1, help="GPUs that share the run (see --zero)")
    group.add_argument("--frames", help="the same as --num-frames")
    group.add_argument("--size", metavar="WxH", help="--width and --height in one, for example 368x272")
    group.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write everything to this file")


def as_json(config: RunConfig, gpus: int, found: Estimate, advised: Sequence[Fit]) -> str:
    """The estimate, the options it is for, and how to fit each budget."""
    from json import dumps

    from vcd_fast.evaluation.machine import versions

    content = {
        **found.as_dict(),
        "gpus": gpus,
        "budgets": [
            {
                "gb": fit.budget,
                "fits": fit.fits,
                "options": [option.flag for option in fit.options],
                "needed_bytes": fit.estimate.needed,
                "peak_phase": fit.estimate.peak.name,
            }
            for fit in advised
        ],
        "config": config.as_dict(),
        "versions": versions(),
    }
    return dumps(content, indent=1)


def _print(config: RunConfig, gpus: int, found: Estimate, advised: Sequence[Fit]) -> None:
    from vcd_fast.training.estimate import GIB, LAST_RESORT

    model, rollout = config.model, config.rollout
    shared = f" on each of {gpus} GPUs, ZeRO {config.training.zero}" if gpus > 1 else ""
    print(
        f"{config.family}, {model.num_frames} frames of {model.width}x{model.height}, {rollout.backprop}, checkpointing "
        f"{rollout.checkpointing}: peak memory in GiB{shared}\n"
    )
    parts = list(
        dict.fromkeys(part for phase in found.phases for part, size in phase.parts.items() if size >= GIB / 200)
    )
    rows = [["phase", *parts, "sum", "needed"]]
    for phase in found.phases:
        sizes = [*(phase.parts.get(part, 0) for part in parts), phase.total, phase.needed]
        rows.append([phase.name, *(f"{size / GIB:.2f}" if size >= GIB / 200 else "" for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    print(f"\n{NOTE}\n")
    for fit in advised:
        flags = " ".join(option.flag for option in fit.options)
        text = f"fits with {flags}" if flags else "fits"
        if not fit.fits:
            text = f"does not fit, {fit.estimate.peak.name} is too large{f' even with {flags}' if flags else ''}"
        print(f"{fit.budget:3d} GB  {text} ({fit.estimate.needed / GIB:.1f} GiB needed)")
    used = dict.fromkeys(option for fit in advised for option in fit.options)
    if used:
        print("\nwhat they cost")
    for option in used:
        print(f"  {option.flag}: {option.costs}")
    if not all(fit.fits for fit in advised):
        print(f"\nwhere it does not fit: {LAST_RESORT}")
