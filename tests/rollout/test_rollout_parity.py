"""Without gradients the sampler is the stock pipeline."""

import pytest
import torch

from vcd_fast.rollout.generate import generate

PROMPTS = ["a cat runs", "the red boat on the sea turns slowly"]


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("image_encoder", [True, False])
def test_equals_the_stock_pipeline(make_model, encode, stock_video, image_encoder, batch, guidance):
    weights = "tiny-random" if image_encoder else "tiny-random-no-image-encoder"
    model = make_model(lora=False, weights=weights, guidance_scale=guidance)
    condition = encode(weights, PROMPTS[:batch])
    found = generate(model, condition, seeds(1, 2)[:batch], 4)
    expected = stock_video(image_encoder, PROMPTS[:batch], seeds(1, 2)[:batch], 4, guidance)
    assert found.shape == expected.shape == (batch, 9, 3, 32, 32)
    assert (found - expected).abs().max() <= 1e-5
    assert found.std() > 0.01


def test_more_steps_and_one_generator(make_model, encode, stock_video):
    found = generate(make_model(lora=False), encode(), torch.Generator().manual_seed(3), 9)
    expected = stock_video(True, PROMPTS, torch.Generator().manual_seed(3), 9, 5.0)
    assert (found - expected).abs().max() <= 1e-5


def test_a_sample_does_not_depend_on_its_batch(model, encode):
    both = generate(model, encode(), seeds(1, 2), 3)
    alone = generate(model, encode().split()[1], seeds(2), 3)
    assert (both[1:] - alone).abs().max() <= 1e-5
    assert (both[0] - both[1]).abs().max() > 0.01


def test_frames_and_progress(model, encode):
    seen = []
    some = generate(model, encode(), seeds(1, 2), 3, frames=[0, 5], on_progress=lambda *a: seen.append(a))
    assert torch.equal(some, generate(model, encode(), seeds(1, 2), 3)[:, [0, 5]])
    assert seen == [("sample", 1, 3), ("sample", 2, 3), ("sample", 3, 3), ("decode", 1, 2), ("decode", 2, 2)]
    assert not some.requires_grad


def test_as_many_generators_as_samples(model, encode):
    with pytest.raises(ValueError, match="generator: expected one for each of 2 samples, got 1"):
        generate(model, encode(), seeds(1), 3)


def test_the_lora_is_seen(make_model, encode, model):
    tuned, base = (generate(m, encode(), seeds(1, 2), 3) for m in (model, make_model(lora=False)))
    assert (tuned - base).abs().max() > 1e-3
