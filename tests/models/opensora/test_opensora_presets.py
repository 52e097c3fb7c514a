"""Presets say what the paper says, and nothing that the settings do not know."""

from __future__ import annotations

import pytest

from vcd_fast.config import compose, preset_names

DATA = {"data": {"pictures": "pictures"}}


@pytest.mark.parametrize("preset", preset_names("opensora"))
def test_every_preset_is_a_configuration(preset):
    assert compose("opensora", preset, DATA).preset == preset


def test_setting_of_the_paper():
    config = compose("opensora", "240p", DATA)
    model, lora, rollout = config.model, config.lora, config.rollout
    assert (model.height, model.width, model.num_frames, model.guidance_scale) == (276, 368, 51, 7)
    assert model.decoded_size == (272, 368)
    assert (lora.rank, lora.alpha, lora.targets) == (16, 8, "default")
    assert (rollout.sampling_steps, rollout.backprop) == (30, "last:1")
    assert (config.training.learning_rate, config.training.max_grad_norm) == (2e-4, 1.0)
    assert config.reward.frames_per_step == 1


def test_toy_has_no_weights_to_find():
    assert compose("opensora", "tiny", DATA).model.weights == "tiny-random"
