"""The small model that comes with the package: what it can do, and that everything finds it."""

import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch

from examples.tiny_i2v import build, check, sample
from examples.tiny_i2v.clips import FRAMES, HEIGHT, MOTIONS, WIDTH
from examples.tiny_i2v.measure import measure, shows
from examples.tiny_i2v.photos import HELD_OUT, of_the_repository
from examples.tiny_i2v.study import report, run
from examples.tiny_i2v.study.arms import ARMS
from vcd_fast.config import compose
from vcd_fast.models import wan
from vcd_fast.models.wan.loading import bundled_model
from vcd_fast.models.wan.settings import TINY_I2V

DATA = {"data": {"pictures": "."}}
STUDY = json.loads((build.MODEL.parents[2] / "docs" / "data" / "study.json").read_text())
AGAIN = json.loads((build.MODEL.parents[2] / "docs" / "data" / "tiny-i2v-again" / "figures.json").read_text())
FIGURES = json.loads((build.MODEL / "figures.json").read_text())
SHOWN = ("pan_left", "pan_right", "pan_up", "zoom_in", "rotate_clockwise", "brighten", "darken", "still")


@pytest.fixture(scope="module")
def scenes():
    return sample.held_out_scenes(8, seed=11, motions=SHOWN, photos=of_the_repository(HELD_OUT))


@pytest.fixture(scope="module")
def conditions(scenes):
    return sample.encode(sample.settings(), scenes)


@pytest.fixture(scope="module")
def videos(scenes, conditions):
    return sample.animate(wan.load_model(sample.settings()), conditions, range(len(scenes)))


def test_its_name_finds_it():
    assert bundled_model() == build.MODEL
    config = compose("wan", TINY_I2V, DATA)
    assert (config.model.height, config.model.width, config.model.num_frames) == (HEIGHT, WIDTH, FRAMES)
    assert (config.model.guidance_scale, config.rollout.sampling_steps) == (sample.GUIDANCE, sample.SAMPLING_STEPS)
    assert wan.missing_weights(config.model) == []


def test_it_is_small():
    assert sum(path.stat().st_size for path in build.MODEL.rglob("*") if path.is_file()) <= build.LIMIT
    assert json.loads((build.MODEL / "training.json").read_text())["parameters"] < 4.1e6


def test_the_card_has_the_figures_of_its_file_which_keep_their_bounds():
    assert sum(FIGURES["vae_psnr"].values()) / len(FIGURES["vae_psnr"]) >= 26
    made = FIGURES["generated"]
    assert made["samples"] >= 200
    assert made["first_frame_psnr"] >= 24
    assert made["motion_shown"] >= 0.8
    assert len(made["motion_shown_by_kind"]) == len(MOTIONS)
    assert min(made["motion_shown_by_kind"].values()) >= 0.5
    card = (build.MODEL / "README.md").read_text()
    assert f"{made['motion_shown']:.0%}** of {made['samples']} videos" in card
    assert all(f"| {name} | {value:.1f} |" in card for name, value in FIGURES["vae_psnr"].items())


def test_the_commands_made_such_a_model_again_from_nothing():
    vae, made = sum(AGAIN["vae_psnr"].values()) / len(AGAIN["vae_psnr"]), AGAIN["generated"]
    assert vae >= 26
    assert made["motion_shown"] >= 0.8
    assert made["first_frame_psnr"] >= 24
    page = (build.MODEL.parent / "README.md").read_text()
    assert f"{100 * made['motion_shown']:.0f} % of {made['samples']} videos" in page
    assert f"{vae:.1f} dB, first frames {made['first_frame_psnr']:.1f} dB" in page


def test_what_it_generates_is_what_the_card_says(scenes, videos):
    shown = [shows(measure(video), scene.motion) for scene, video in zip(scenes, videos, strict=True)]
    p = sum(FIGURES["generated"]["motion_shown_by_kind"][name] for name in SHOWN) / len(SHOWN)
    # of so many: three deviations below the share would not be chance
    assert sum(shown) / len(shown) >= p - 3 * math.sqrt(p * (1 - p) / len(shown))
    first = [check.decibels(float((v[0] - s.true[0]).square().mean())) for s, v in zip(scenes, videos, strict=True)]
    assert sum(first) / len(first) >= 24


def test_the_vae_is_what_the_card_says():
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(build.MODEL, subfolder="vae", local_files_only=True)
    photos = of_the_repository(HELD_OUT)
    found = check.reconstruction(vae, photos=photos)
    assert found == pytest.approx({name: FIGURES["vae_psnr"][name] for name in photos}, abs=0.05)


def test_the_stock_pipeline_makes_the_same_video(scenes, conditions):
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    pipe = WanImageToVideoPipeline.from_pretrained(build.MODEL, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    sigmas = np.linspace(1, 0, sample.SAMPLING_STEPS + 1)[:-1]  # Wan's own levels, which the rollout has
    pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
    pixels = (scenes[0].true[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    expected = pipe(
        image=Image.fromarray(pixels),
        prompt=scenes[0].prompt,
        negative_prompt="",
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=sample.SAMPLING_STEPS,
        guidance_scale=sample.GUIDANCE,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames[0]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    chosen = sample.settings()
    condition = wan.load_encoder(chosen).encode(image, [scenes[0].prompt], [""], HEIGHT, WIDTH, FRAMES)
    video = sample.animate(wan.load_model(chosen), condition.split(), [5])[0]
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=0)


def test_its_memory_is_estimated_from_its_own_configurations():
    from vcd_fast.training.estimate import estimate

    config = compose("wan", TINY_I2V, DATA)
    encoders = wan.encoder_bytes(config.model)
    assert set(encoders) == {"text encoder"}
    assert encoders["text encoder"] < 1e6
    assert estimate(config).needed < 3e9


@pytest.mark.parametrize(("metric", "sign"), [("psnr", 1), ("features", 1), ("flicker", -1)])
def test_the_study_of_the_model_shows_what_its_page_says(metric, sign):
    base, tuned = STUDY["arms"]["base"], STUDY["arms"]["vcd"]
    assert sign * (tuned[metric]["mean"] - base[metric]["mean"]) > 2 * tuned[metric]["within"]  # they do not touch
    assert tuned["motion"]["mean"] >= 0.7 * base["motion"]["mean"]
    assert {name for name, arm in STUDY["arms"].items() if arm["seeds"] == 3} == {arm.name for arm in ARMS}


def test_the_study_in_short_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    words = f"--output {tmp_path}/study --arms vcd --seeds 0 --steps 1 --pictures 2 --scenes 2 --noises 1 --photos repository"
    monkeypatch.setattr(sys, "argv", ["run", *words.split(), "--trainer", "--num-projections", "4"])
    for expected in (2, 0):
        run.main()
        assert capsys.readouterr().out.count("judged in") == expected
    monkeypatch.setattr(sys, "argv", ["report", "--output", f"{tmp_path}/study", "--docs", f"{tmp_path}/docs"])
    report.main()
    record = json.loads((tmp_path / "docs" / "data" / "study.json").read_text())
    assert set(record["arms"]) == {"base", "vcd"}
    assert record["arms"]["vcd"]["samples"] == 2
    assert record["arms"]["vcd"]["psnr"]["by_seed"] == pytest.approx([record["arms"]["vcd"]["psnr"]["mean"]])
    assert (tmp_path / "docs" / "study.png").stat().st_size > 10_000
    assert "| VCD |" in capsys.readouterr().out
