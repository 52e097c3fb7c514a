"""How exact an answer is, and how exact it has to be."""

from __future__ import annotations

import dataclasses

LARGEST_LOSS_ERROR = 1e-5
LARGEST_ERROR_RATIO = 2.0
"""of the gradient's error to that of the reference in float32"""
LEAST_COSINE = 0.9999


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far a provider is from float64, and how far the reference's float32 is: relative errors, of gradients that of their norm."""

    instance: str
    loss_error: float
    gradient_error: float
    cosine: float
    reference_loss_error: float
    reference_gradient_error: float
    one_tie: float
    """error of a gradient in which one pair of values is swapped"""

    def problems(self, dtype: str = "float32") -> list[str]:
        """What is wrong; nothing if the provider may be timed. Where VGG19 runs in bfloat16 the reference does too, and sets the bounds."""
        exact = dtype == "float32"
        loss = LARGEST_LOSS_ERROR if exact else max(LARGEST_LOSS_ERROR, LARGEST_ERROR_RATIO * self.reference_loss_error)
        gradient = max(LARGEST_ERROR_RATIO * self.reference_gradient_error, self.one_tie)
        found = []
        # written so that NaN fails
        if not self.loss_error <= loss:
            found.append(f"its loss is off by {self.loss_error:.1e}, expected at most {loss:.1e}")
        if not self.gradient_error <= gradient:
            found.append(f"its gradient is off by {self.gradient_error:.1e}, expected at most {gradient:.1e}")
        if exact and not self.cosine >= LEAST_COSINE:
            found.append(f"the cosine of its gradient is {self.cosine:.6f}, expected at least {LEAST_COSINE}")
        return found
