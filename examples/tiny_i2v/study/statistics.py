"""Means with intervals that know which samples belong together, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

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


def within(first: Sequence[float], second: Sequence[float]) -> float:
    """Half the width of the 95 % intervals of two means over the same clusters, once each cluster's own level is taken out.

    What clusters have in common under both conditions says nothing about the conditions (Cousineau 2005; Morey 2008, whose factor
    makes up for the level being estimated): t · s(first - second) / sqrt(2 n). Two such intervals that do not touch ask for more than
    a paired t-test does at 5 %, by a factor of sqrt(2).

    Args:
        first, second: n numbers each, one per cluster, in the same order.

    Raises:
        ValueError: not as many of one as of the other, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"first, second: expected as many of both, at least 2, got {len(first)} and {len(second)}")
    difference = np.asarray(first, float) - np.asarray(second, float)
    n = len(difference)
    return float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(2 * n))


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of paired differences, one per cluster, by flipping signs at random: the share of flips with a mean as far from 0."""
    values = np.asarray(differences, float)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(values)))
    flipped = np.abs((signs * values).mean(1))
    return float((1 + (flipped >= abs(values.mean()) - 1e-12).sum()) / (RESAMPLES + 1))
