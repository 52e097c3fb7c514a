"""Tiny Wan models with a LoRA, and stock pipelines on the same weights."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vcd_fast.models.lora import LoRASettings, add_lora, lora_parameters
from vcd_fast.models.wan import ModelSettings, load_encoder, load_model
from vcd_fast.models.wan.tiny import tiny_components
from vcd_fast.rollout.plan import RolloutSettings

HEIGHT, WIDTH, FRAMES = 32, 32, 9
PROMPTS = ["a cat runs", "the red boat on the sea turns slowly"]
SAMPLING_STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for more, and threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model():
    """make_model(lora=True, **settings): float32, random weights; the LoRA is not zero."""

    def make(lora=True, **changes):
        values = {"weights": "tiny-random", "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "dtype": "float32"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="model.weights=tiny-random")
            model = load_model(ModelSettings(**{**values, **changes}))
        if lora:
            add_lora(model, LoRASettings(rank=4, alpha=4), seed=1)
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for parameter in lora_parameters(model).values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """With image encoder and LoRA. Not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def image():
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3)).astype("uint8"))


@pytest.fixture(scope="session")
def encode(image):
    """encode(weights, prompts) -> condition, every prompt with the one picture."""

    def make(weights="tiny-random", prompts=PROMPTS):
        settings = ModelSettings(weights=weights, height=HEIGHT, width=WIDTH, num_frames=FRAMES, dtype="float32")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        images = pixels.expand(len(prompts), -1, -1, -1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="model.weights=tiny-random")
            return load_encoder(settings).encode(images, prompts, ["still"] * len(prompts), HEIGHT, WIDTH, FRAMES)

    return make


@pytest.fixture(scope="session")
def condition(encode):
    return encode(prompts=PROMPTS[:1])


@pytest.fixture(scope="session")
def plan():
    """plan("last:1", checkpointing=...)."""

    def make(backprop, **settings):
        return RolloutSettings(sampling_steps=SAMPLING_STEPS, backprop=backprop, **settings).plan()

    return make


@pytest.fixture(scope="session")
def stock_video(image):
    """stock_video(image_encoder, prompts, generators, steps) by `WanImageToVideoPipeline` on our noise levels."""
    from diffusers import WanImageToVideoPipeline

    def call(image_encoder, prompts, generators, sampling_steps, guidance):
        pipe = WanImageToVideoPipeline(**copy.deepcopy(tiny_components(image_encoder)))
        pipe.set_progress_bar_config(disable=True)
        sigmas = np.linspace(1, 0, sampling_steps + 1)[:-1]
        pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
        return pipe(
            image=image,
            prompt=prompts,
            negative_prompt=["still"] * len(prompts),
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=sampling_steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).frames

    return call
