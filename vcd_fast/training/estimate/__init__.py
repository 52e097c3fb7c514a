"""How much memory a run will take, before anything is loaded: `estimate(config)`; what makes it fit: `fits(config)`."""

from vcd_fast.training.estimate.advice import BUDGETS, LAST_RESORT, OPTIONS, Fit, Option, fits, next_option
from vcd_fast.training.estimate.estimate import GIB, Estimate, Phase, estimate

__all__ = [
    "BUDGETS",
    "GIB",
    "LAST_RESORT",
    "OPTIONS",
    "Estimate",
    "Fit",
    "Option",
    "Phase",
    "estimate",
    "fits",
    "next_option",
]
