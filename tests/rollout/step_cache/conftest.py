"""Tiny models with a rule that skips about half of the steps."""

import warnings

import pytest
import torch

from vcd_fast.models import opensora
from vcd_fast.models.lora import LoRASettings, add_lora, lora_parameters
from vcd_fast.models.opensora.condition import OpenSoraCondition
from vcd_fast.rollout.step_cache import StepCacheConfig, apply_step_cache

SIZE = (32, 32, 9)


@pytest.fixture(scope="session")
def half():
    """half(**changes): the settings of a cache that computes steps 0, 3, 5 and 7 of 8 of the tiny Wan model."""

    def make(**changes):
        values = {"coefficients": (1.0, 0.0), "mode": "ret", "threshold": 0.5, "first": 1, "last": 0}
        return StepCacheConfig(**{**values, **changes})

    return make


@pytest.fixture
def cached(make_model, half):
    """cached(config=half(), **settings): a model with LoRA and the cache applied to it."""

    def make(config=None, **settings):
        model = make_model(**settings)
        return model, apply_step_cache(model.transformer, config or half())

    return make


@pytest.fixture(scope="session")
def schedule_of():
    def make(model, steps):
        return model.schedule(steps, *SIZE)

    return make


@pytest.fixture
def make_opensora():
    """make_opensora(**settings): Open-Sora's tiny model with a LoRA that is not zero, and a condition for it."""

    def make(**changes):
        values = {"weights": "tiny-random", "height": 32, "width": 48, "num_frames": 17, "dtype": "float32"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="model.weights=tiny-random")
            model = opensora.load_model(opensora.ModelSettings(**{**values, **changes}))
        add_lora(model, LoRASettings(rank=2, alpha=2), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        condition = OpenSoraCondition(
            text=torch.randn(1, 5, 32, generator=generator),
            text_mask=torch.ones(1, 5, dtype=torch.bool),
            negative_text=None,
            negative_text_mask=None,
            image_latents=torch.randn(1, 4, 1, 4, 6, generator=generator),
        )
        return model, condition

    return make
