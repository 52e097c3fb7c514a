"""TeaCache's rule (arXiv 2411.19108) as a pure function of distances: which steps of a sampler are computed, which are skipped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class Rule:
    """A step is skipped while the estimated change of the output since the last computed step stays below a threshold.

    With d_k = mean|m_k - m_{k-1}| / mean|m_{k-1}| of what the blocks are modulated with, the estimate is the sum of p(d_k), p a
    polynomial fitted per model. p is not clamped and may be negative.

    Args:
        coefficients: of p, highest power first.
        threshold: skip while the sum is below this.
        first, last: steps at both ends that are always computed.

    Raises:
        ValueError: no coefficients, a threshold that is not positive, negative counts, numbers that are not finite.
    """

    coefficients: tuple[float, ...]
    threshold: float
    first: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        if not self.coefficients or not all(math.isfinite(value) for value in self.coefficients):
            raise ValueError(f"coefficients: expected finite numbers, highest power first, got {self.coefficients}")
        if not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold: expected a finite number above 0, got {self.threshold}")
        if self.first < 1 or self.last < 0:
            raise ValueError(
                f"first, last: expected at least 1 and 0 steps that are always computed, got {self.first} and {self.last}"
            )

    def estimate(self, distance: float) -> float:
        """p(distance)."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * distance + coefficient
        return value

    def is_forced(self, step: int, num_steps: int) -> bool:
        """Whether step `step` (from 0) of `num_steps` is computed whatever the distances are."""
        return step < self.first or step >= num_steps - self.last

    def decide(self, accumulated: float, distance: float) -> tuple[bool, float]:
        """(compute this step, what is accumulated after it), given what was accumulated before it. For steps that are not forced;
        a forced step is computed and leaves 0."""
        accumulated += self.estimate(distance)
        compute = not accumulated < self.threshold  # a distance that is not a number computes
        return compute, 0.0 if compute else accumulated


def skip_map(rule: Rule, distances: Sequence[float], compute_at: Collection[int] = ()) -> tuple[bool, ...]:
    """For every step whether it is computed.

    Args:
        distances: d_k for every step; that of step 0 is not read.
        compute_at: further steps that are computed as if they were forced.
    """
    total, accumulated, computed = len(distances), 0.0, []
    for step, distance in enumerate(distances):
        if rule.is_forced(step, total) or step in compute_at:
            compute, accumulated = True, 0.0
        else:
            compute, accumulated = rule.decide(accumulated, distance)
        computed.append(compute)
    return tuple(computed)


def describe_map(computed: Sequence[bool]) -> str:
    """ "C..C.C: 3 of 6 steps computed, 50 % of the block forwards saved"."""
    count, total = sum(computed), len(computed)
    picture = "".join("C" if each else "." for each in computed)
    return (
        f"{picture}: {count} of {total} steps computed, {100 * (1 - count / total):.0f} % of the block forwards saved"
    )
