"""Small models of the real classes with seeded random weights: how they are drawn, and what their user is told."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Iterator

import torch

SEED = 0


@contextlib.contextmanager
def seeded(component: str) -> Iterator[None]:
    """Draw a component's weights from its own seed and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + zlib.crc32(component.encode()))
        yield


def warn_random(what: str) -> None:
    """To be called where a user asks for the model: the warning points at the caller of the caller."""
    warnings.warn(
        f"{what}: these weights are random, so videos and rewards mean nothing; they exist to try a setup quickly. "
        "Set model.weights to a folder or hub name for a real model.",
        UserWarning,
        stacklevel=3,
    )
