"""How a video is made, with gradients and without."""

from vcd_fast.rollout.generate import generate
from vcd_fast.rollout.plan import Plan, RolloutSettings
from vcd_fast.rollout.sampler import Rollout, rollout, run

__all__ = ["Plan", "Rollout", "RolloutSettings", "generate", "rollout", "run"]
