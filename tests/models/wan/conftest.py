"""Tiny Wan models and stock pipelines, built once."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vcd_fast.models.wan import ModelSettings, load_encoder, load_model
from vcd_fast.models.wan.tiny import save_tiny_pipeline, tiny_components

HEIGHT, WIDTH, FRAMES = 32, 48, 9
PROMPTS = ["a cat runs", "the red boat on the sea turns slowly"]
NEGATIVE = "still"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for more, and threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def settings():
    """make_settings(**changes): small, float32, random weights."""

    def make(**changes):
        values = {"weights": "tiny-random", "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "dtype": "float32"}
        return ModelSettings(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def quiet():
    """Call something that loads the tiny model without its warning, which one test is about."""

    def call(function, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="model.weights=tiny-random")
            return function(*args, **kwargs)

    return call


@pytest.fixture(scope="session")
def make_model(settings, quiet):
    def make(**changes):
        return quiet(load_model, settings(**changes))

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """With image encoder, without LoRA. Not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def pictures():
    """Two 8-bit pictures: (PIL images, the same as [2, 3, H, W] in [0, 1])."""
    pixels = np.random.RandomState(0).randint(0, 256, (2, HEIGHT, WIDTH, 3)).astype("uint8")
    return [Image.fromarray(p) for p in pixels], torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="session")
def encode(settings, quiet, pictures):
    """encode(weights) -> condition of the two pictures with PROMPTS."""

    def make(weights="tiny-random", images=pictures[1], prompts=PROMPTS, **changes):
        encoder = load_encoder(settings(weights=weights, **changes))
        return quiet(encoder.encode, images, prompts, [NEGATIVE] * len(prompts), HEIGHT, WIDTH, FRAMES)

    return make


@pytest.fixture(scope="session")
def condition(encode):
    return encode()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture(scope="session")
def stock():
    """stock(image_encoder) -> a fresh WanImageToVideoPipeline on the tiny components."""
    from diffusers import WanImageToVideoPipeline

    components = {True: tiny_components(True), False: tiny_components(False)}

    def make(image_encoder=True, sampling_steps=None):
        pipe = WanImageToVideoPipeline(**copy.deepcopy(components[image_encoder]))
        pipe.set_progress_bar_config(disable=True)
        if sampling_steps is not None:
            sigmas = np.linspace(1, 0, sampling_steps + 1)[:-1]
            pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
        return pipe

    return make


@pytest.fixture(scope="session")
def call_stock():
    """call(pipe, image, prompts, generators, sampling_steps, guidance) -> video [B, T, 3, H, W] in [0, 1]."""

    def call(pipe, image, prompts, generators, sampling_steps, guidance=5.0):
        return pipe(
            image=image,
            prompt=prompts,
            negative_prompt=[NEGATIVE] * len(prompts),
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=sampling_steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).frames

    return call


@pytest.fixture(scope="session")
def saved_bytes():
    """saved_bytes(excluded parameters): bytes of distinct storages kept for the backward within it."""

    class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, excluded):
            excluded = {p.untyped_storage().data_ptr() for p in excluded}
            self.sizes = {}

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in excluded:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            super().__init__(pack, lambda tensor: tensor)

        def __enter__(self):
            super().__enter__()
            return self

        @property
        def total(self):
            return sum(self.sizes.values())

    return SavedBytes
