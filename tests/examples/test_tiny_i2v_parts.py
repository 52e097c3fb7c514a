"""The pieces the small image-to-video model is made and judged with."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from examples.tiny_i2v import clips, measure, photos
from examples.tiny_i2v.muon import Muon, MuonAndAdamW, orthogonal
from examples.tiny_i2v.state import Average, load_state, save_state
from examples.tiny_i2v.study.statistics import clustered, sign_flip_p, within
from examples.tiny_i2v.text import attend_to_short_text, encode_prompts
from examples.tiny_i2v.train_transformer import Model, matrices
from examples.tiny_i2v.train_vae import CONFIG, new_vae, pictures_as_planes, places, reconstruct


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photo():
    return photos.read_photo("raccoon.jpg")


@pytest.fixture(scope="module")
def other():
    return photos.read_photo("coffee.jpg")


@pytest.mark.parametrize("name", clips.MOTIONS)
def test_the_motion_a_clip_was_made_with_is_the_motion_measured_and_no_other(name, photo, other):
    motion = clips.MOTIONS[name]
    clip, cutout = clips.scene(photo, motion, generator(3), piece_from=other)
    found = measure.measure(clip, cutout)
    assert measure.shows(found, motion)
    amount = measure.amount(found, motion)
    if name == "still":
        assert amount < 0.02
    elif name == "brighten":
        assert 0.6 < amount < 1.2  # white grows no whiter
    else:
        assert amount == pytest.approx(1, abs=clips.VARIATION + 0.08)
    drifting = motion.drift is not None
    for wrong in clips.MOTIONS.values():
        if wrong.name != name and (wrong.drift is None or drifting):
            # while a piece drifts over it the picture itself may well be still
            assert not measure.shows(found, wrong) or (drifting and wrong.name == "still")


def test_a_clip_depends_on_its_seed_alone_and_starts_the_same_however_long(photo):
    motion = clips.MOTIONS["zoom_in"]
    first, _ = clips.scene(photo, motion, generator(1))
    again, _ = clips.scene(photo, motion, generator(1), frames=3)
    other, _ = clips.scene(photo, motion, generator(2))
    assert first.shape == (clips.FRAMES, 3, clips.HEIGHT, clips.WIDTH)
    assert torch.equal(first[:3], again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_a_cut_out_needs_a_photo_it_is_cut_from(photo):
    with pytest.raises(ValueError, match="piece_from"):
        clips.scene(photo, clips.MOTIONS["drift_up"], generator())


def test_no_photograph_is_trained_on_and_held_out():
    assert not set(photos.TRAINING) & set(photos.HELD_OUT)
    with pytest.raises((FileNotFoundError, ImportError), match=r"nothing\.png"):  # the latter without scikit-image
        photos.read_photo("nothing.png")


def test_warping_by_a_pose_undoes_what_was_registered(photo):
    clip, _ = clips.scene(photo, clips.MOTIONS["rotate_clockwise"], generator(5))
    poses = measure.measure(clip).poses
    moved, inside = measure.warp(clip[0], poses[-1])
    error = (inside * (moved - clip[-1]).square()).sum() / (3 * inside.sum())
    untouched = (inside * (clip[0] - clip[-1]).square()).sum() / (3 * inside.sum())
    assert error < 0.1 * untouched
    assert 0.5 < inside.mean() < 1


def test_pictures_as_planes_are_exact():
    torch.manual_seed(0)
    vae, picture = new_vae(), torch.rand(2, 3, 1, 32, 48) * 2 - 1
    expected = reconstruct(vae, picture)[0]
    with pictures_as_planes():
        found = reconstruct(vae, picture)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(reconstruct(vae, picture)[0], expected)  # and over when the block is


def test_attention_to_the_prompt_alone_is_exact():
    torch.manual_seed(0)
    model = Model().eval()
    channels = CONFIG["z_dim"]
    noised, condition = torch.randn(2, channels, 3, 4, 6), torch.randn(2, channels + 4, 3, 4, 6)
    sigma, prompts = torch.tensor([0.3, 0.9]), ["the camera pans left", "an unknown word and a still picture"]
    with torch.no_grad():
        expected = model.transformer(
            hidden_states=torch.cat([noised, condition], 1),
            timestep=1000 * sigma,
            encoder_hidden_states=encode_prompts(model.text_encoder, model.tokenizer, prompts, 512),
            return_dict=False,
        )[0]
        attend_to_short_text(model.transformer)
        found = model(noised, condition, sigma, prompts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="prompts: expected fewer than 24 tokens"):
        model(noised, condition, sigma, ["left " * 30] * 2)


def test_muon_makes_updates_orthogonal():
    torch.manual_seed(0)
    for shape in ((24, 60), (60, 24)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert singular.min() > 0.6
        assert singular.max() < 1.3
    kernel = torch.nn.Parameter(torch.zeros(8, 4, 3, 3))
    unused = torch.nn.Parameter(torch.ones(2, 2))
    kernel.grad = torch.randn(8, 4, 3, 3)
    Muon([kernel, unused], lr=0.1).step()
    assert torch.equal(unused, torch.ones(2, 2))
    singular = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert singular.min() > 0.06
    assert singular.max() < 0.13


def test_training_goes_on_where_it_stopped(tmp_path):
    def train(module, optimizer, average, first, last):
        for step in range(first, last):
            module(torch.randn(4, 3, generator=generator(step))).square().mean().backward()
            optimizer.step(1.0)
            average.update(module)

    def new():
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        matrix = {name: tensor.dim() == 2 for name, tensor in module.named_parameters()}
        return module, MuonAndAdamW(module, matrix, 0.02, 0.002), Average(module, 0.99)

    whole = new()
    train(*whole, 0, 6)
    first, path = new(), tmp_path / "state.pt"
    assert load_state(path, *first) == (0, 0.0)
    train(*first, 0, 3)
    save_state(path, *first, 3, 1.5)
    second = new()
    assert load_state(path, *second) == (3, 1.5)
    train(*second, 3, 6)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(whole[2].values[name], second[2].values[name]) for name in whole[2].values)


def test_every_matrix_inside_the_blocks_is_muons_and_nothing_else():
    with torch.device("meta"):
        chosen = matrices(Model())
    assert chosen["transformer.blocks.0.attn1.to_q.weight"]
    assert not any(chosen[name] for name in chosen if "blocks" not in name or name.endswith("bias"))


def test_intervals_widen_with_clusters_not_with_copies():
    values, scenes = [1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3]
    mean, low, high = clustered(values, scenes)
    assert mean == 2.5
    assert low < 2.5 < high
    assert clustered(values * 9, scenes * 9) == pytest.approx((mean, low, high))
    with pytest.raises(ValueError, match="clusters"):
        clustered([1.0], [0])
    assert sign_flip_p([1.0, 1.2, 0.9, 1.1, 1.3, 0.8, 1.0, 1.1, 0.9, 1.0]) < 0.01
    assert sign_flip_p([1.0, -1.0, 0.5, -0.5]) > 0.5


def test_levels_of_clusters_do_not_widen_intervals_within_them():
    rng = np.random.default_rng(0)
    levels, first, second = rng.normal(0, 100, 40), rng.normal(0, 1, 40), rng.normal(0.5, 1, 40)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    half = within(levels + first, levels + second)
    assert half == pytest.approx((expected.high - expected.low) / 2 / math.sqrt(2))
    assert half == pytest.approx(within(first, second))
    with pytest.raises(ValueError, match="as many of both"):
        within([1.0, 2.0], [1.0])


def test_places_say_where_a_latent_is():
    latents = torch.randn(2, CONFIG["z_dim"], 3, 8, 12, generator=generator(4))
    x, y = places(latents)[1, :, 2] / latents.std()
    torch.testing.assert_close(x, x[:1].expand_as(x))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    torch.testing.assert_close(x[0], torch.linspace(-1 + 1 / 12, 1 - 1 / 12, 12))
    torch.testing.assert_close(y[:, 0], torch.linspace(-1 + 1 / 8, 1 - 1 / 8, 8))
