"""Means with intervals that know which samples belong together, and paired tests."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 4000


def clustered(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval, bootstrapped over whole clusters (noises and training seeds of one scene are no independent samples).

    Args:
        values: n numbers. clusters: what each belongs to.

    Returns:
        mean, lower and upper bound.

    Raises:
        ValueError: not one cluster per value, or fewer than two clusters.
    """
    if len(values) != len(clusters):
        raise ValueError(f"clusters: expected one for each of {len(values)} values, got {len(clusters)}")
    names = list(dict.fromkeys(clusters))
    if len(names) < 2:
        raise ValueError(f"clusters: expected at least 2, got {len(names)}")
    position = {name: i for i, name in enumerate(names)}
    which = np.array([position[name] for name in clusters])
    sums = np.bincount(which, weights=np.asarray(values, float))
    counts = np.bincount(which).astype(float)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of paired differences, one per cluster, by flipping signs at random: the share of flips with a mean as far from 0."""
    values = np.asarray(differences, float)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(values)))
    flipped = np.abs((signs * values).mean(1))
    return float((1 + (flipped >= abs(values.mean()) - 1e-12).sum()) / (RESAMPLES + 1))
