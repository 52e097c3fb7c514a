"""Open-Sora through the protocol of model families: guidance, batches, conditions, decoding, gradients, bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vcd_fast.media import resize_crop
from vcd_fast.models.base import family
from vcd_fast.models.encoding_cache import EncodingItem, encode_all
from vcd_fast.models.lora import LoRASettings, add_lora, lora_parameters
from vcd_fast.models.opensora.adapter import OpenSoraI2V
from vcd_fast.models.opensora.condition import OpenSoraCondition
from vcd_fast.models.opensora.settings import ModelSettings
from vcd_fast.rollout import Plan, generate, rollout, run

package = family("opensora")


def settings_of(**changes) -> ModelSettings:
    tiny = {"weights": "tiny-random", "height": 36, "width": 48, "num_frames": 17, "dtype": "float32"}
    return ModelSettings(**{**tiny, **changes})


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.weights=tiny-random", category=UserWarning)
        return function(*arguments)


@pytest.fixture
def model() -> OpenSoraI2V:
    return quietly(package.load_model, settings_of())


@pytest.fixture(scope="module")
def condition() -> OpenSoraCondition:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 36, 48, generator=generator)
    encoder = quietly(package.load_encoder, settings_of())
    prompts = ["a cat on a mat", "two dogs run after a ball"]
    return quietly(encoder.encode, images, prompts, ["", ""], 36, 48, 17)


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(batch)]


# --- the protocol ------------------------------------------------------------------------------------------------------------------


def test_guidance_passes_and_gradients(condition, model):
    """Both branches in one forward or in two are the same; `conditional` has the same value and the gradient of one branch."""
    add_lora(model, LoRASettings(rank=2, alpha=2), seed=0)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    state = model.initial(condition, generators(2))
    step = model.schedule(4, 36, 48, 17)[2]

    def run_with(**changes) -> tuple[Tensor, Tensor]:
        model.settings = settings_of(**changes)
        velocity = model.velocity(state, step, condition)
        model.transformer.zero_grad()
        velocity.square().sum().backward()
        return velocity.detach(), torch.cat([p.grad.flatten() for p in lora_parameters(model).values()])

    joint, separate = run_with(), run_with(guidance_passes="separate")
    torch.testing.assert_close(joint[0], separate[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joint[1], separate[1], rtol=1e-3, atol=1e-4 * joint[1].abs().max().item())
    conditional = run_with(guidance_gradient="conditional")
    assert torch.equal(conditional[0], separate[0])
    assert (conditional[1] - separate[1]).norm() > 0.01 * separate[1].norm()
    only = run_with(guidance_scale=1)[0]
    other = run_with(guidance_scale=2, guidance_passes="separate")[0]
    unconditional = 2 * only - other
    torch.testing.assert_close(unconditional + 7 * (only - unconditional), joint[0], rtol=1e-3, atol=1e-4)


def test_a_batch_of_different_pictures_and_prompts_equals_its_samples(condition, model):
    assert condition.text_mask is not None, "prompts of different length"
    together = generate(model, condition, generators(2), 3, frames=[1, 16])
    assert together.shape == (2, 2, 3, 32, 48)
    for index, alone in enumerate(condition.split()):
        assert alone.text_mask is None
        video = generate(model, alone, [generators(2)[index]], 3, frames=[1, 16])
        torch.testing.assert_close(video[0], together[index], rtol=0, atol=1e-5)


def test_conditions_are_split_collated_and_stored_without_change(condition, tmp_path):
    items = condition.split()
    again = OpenSoraCondition.collate(items)
    for name in ("image_latents", "text", "text_mask"):
        assert torch.equal(getattr(again, name), getattr(condition, name)), name
    assert again.negative_text is None
    items[1].save(tmp_path / "one.safetensors")
    loaded = OpenSoraCondition.load(tmp_path / "one.safetensors")
    assert torch.equal(loaded.text, items[1].text)
    assert loaded.text_mask is None
    assert loaded.text.dtype == torch.bfloat16
    assert loaded.image_latents.dtype == torch.float32
    same = OpenSoraCondition.collate([items[0], items[0]])
    assert same.text_mask is None, "nothing to pad"
    with pytest.raises(ValueError, match="expected at least one condition"):
        OpenSoraCondition.collate([])


def test_encodings_are_cached_on_disk(tmp_path, monkeypatch):
    encoder = quietly(package.load_encoder, settings_of())
    image = torch.rand(3, 36, 48, generator=torch.Generator().manual_seed(0))
    items = [EncodingItem(image, prompt) for prompt in ("a cat", "two dogs run", "a cat")]
    first = quietly(encode_all, encoder, items, tmp_path, 36, 48, 17)
    monkeypatch.setattr(encoder, "encode", None)  # nothing is encoded a second time
    again = encode_all(encoder, items, tmp_path, 36, 48, 17)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.text, other.text)
        assert torch.equal(one.image_latents, other.image_latents)
    assert OpenSoraCondition.collate(list(again)).text_mask.sum(1).tolist() == [c.text.shape[1] for c in again]


def test_picture_is_kept_bit_for_bit_over_51_frames(model):
    """Image to video, all the way, at 51 frames."""
    settings = settings_of(num_frames=51)
    encoder, model = (quietly(load, settings) for load in (package.load_encoder, package.load_model))
    image = torch.rand(1, 3, 36, 48, generator=torch.Generator().manual_seed(1))
    condition = quietly(encoder.encode, image, ["a cat"], [""], 36, 48, 51)
    schedule = model.schedule(4, 36, 48, 51)
    with torch.no_grad():
        latents = rollout(model, condition, model.initial(condition, generators(1)), schedule, Plan())
        video = model.decode(latents)
    assert latents.shape == (1, 4, 15, 4, 6)
    assert torch.equal(latents[:, :, 0], condition.image_latents[:, :, 0])
    assert video.shape == (1, 51, 3, 32, 48)
    assert video.isfinite().all()
    assert video.min() >= 0
    assert video.max() <= 1
    assert (video[:, 1:] - video[:, :-1]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-3, "no two frames in a row are equal"


def test_an_edited_first_frame_moves(condition):
    model = quietly(package.load_model, settings_of(mask_strategy="0,0,0,0,1,0.5"))
    state = model.initial(condition, generators(2))
    assert state.noise is not None
    latents = rollout(model, condition, state, model.schedule(4, 36, 48, 17), Plan())
    assert not torch.equal(latents[:, :, 0], condition.image_latents[:, :, 0])


def test_compared_part_of_the_picture_is_cropped_not_resized(model):
    picture = torch.arange(36.0 * 48).view(1, 36, 48)
    assert model.settings.decoded_size == (32, 48)
    assert torch.equal(model.reference(picture), picture[:, :32, :48])
    assert ModelSettings().decoded_size == (272, 368)


def test_pictures_arrive_as_open_sora_would_see_them(golden):
    """The loader's resizing against the original's, by PIL: 8-bit rounding apart, the same."""
    case = golden("image_resize_crop")
    for name, sizes in case.meta["cases"].items():
        picture, expected = (case.tensors[f"{name}.{end}"].permute(2, 0, 1).float() / 255 for end in ("in", "out"))
        assert list(picture.shape[1:]) == sizes["src"]
        difference = (resize_crop(picture, *sizes["target"]) - expected).abs()
        assert difference.max() <= 1.5 / 255
        assert difference.mean() <= 0.5 / 255


def test_decode_is_differentiable_and_in_range(condition, model):
    latents = (3 * torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    frames = model.decode(latents, [3, 9])
    assert frames.shape == (1, 2, 3, 32, 48)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() <= frames.max() <= 1
    frames.mean().backward()
    assert latents.grad.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents)[:, [3, 9]], frames, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_precision(dtype, condition):
    settings = settings_of(dtype=dtype, vae_dtype=dtype if dtype == "bfloat16" else "float32")
    model = quietly(package.load_model, settings)
    exact = quietly(package.load_model, settings_of())
    schedule = model.schedule(3, 36, 48, 17)
    videos = []
    for each in (model, exact):
        with torch.no_grad():
            latents = rollout(each, condition, each.initial(condition, generators(2)), schedule, Plan())
            assert latents.dtype == torch.float32
            videos.append(each.decode(latents, [5]))
    assert (videos[0] - videos[1]).abs().mean() < 0.02


def test_pieces_of_the_backward_add_up(condition, model):
    """What the trainer does: reward gradient on detached latents, then step by step into the LoRA."""
    add_lora(model, LoRASettings(rank=2, alpha=2), seed=0)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    schedule = model.schedule(4, 36, 48, 17)
    state = model.initial(condition, generators(2))
    towards = torch.randn(2, 4, 5, 4, 6, generator=torch.Generator().manual_seed(5))

    def gradients(plan: Plan) -> list[Tensor]:
        model.transformer.zero_grad()
        result = run(model, condition, state, schedule, plan, generator=torch.Generator().manual_seed(0))
        for term in result.surrogates(towards):
            term.backward()
        return [parameter.grad.clone() for parameter in lora_parameters(model).values()]

    whole = gradients(Plan("all", stop_input_gradient=True, checkpointing="none"))
    model.transformer.zero_grad()
    latents = rollout(model, condition, state, schedule, Plan("all", stop_input_gradient=True, checkpointing="block"))
    (latents * towards).sum().backward()
    for piece, parameter in zip(whole, lora_parameters(model).values(), strict=True):
        torch.testing.assert_close(piece, parameter.grad, rtol=1e-4, atol=1e-5 * piece.abs().max().item())


def test_overfitting_a_lora_moves_frames_towards_the_picture(model):
    """60 optimizer steps on one picture and one noise, through sampler and decode."""
    image = torch.full((1, 3, 36, 48), 0.25)
    encoder = quietly(package.load_encoder, settings_of())
    condition = quietly(encoder.encode, image, ["a grey wall"], [""], 36, 48, 17)
    parameters = list(add_lora(model, LoRASettings(rank=4, alpha=4), seed=0).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = model.schedule(2, 36, 48, 17)
    state = model.initial(condition, generators(1))
    target = model.reference(image)[:, None]

    def loss() -> Tensor:
        latents = rollout(model, condition, state, schedule, Plan("last", 1))
        return (model.decode(latents, [5]) - target).square().mean()

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().item() < 0.9 * first


# --- what cannot be ----------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_setting_of_the_paper():
    settings = ModelSettings()
    assert (settings.height, settings.width, settings.num_frames, settings.fps) == (276, 368, 51, 24)
    assert (settings.guidance_scale, settings.aesthetic_score, settings.negative_prompt) == (7, 6.5, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 50}, "expected a multiple of 17.*nearest are 34 and 51"),
        ({"num_frames": 16}, "expected a multiple of 17.*nearest are 17 and 34"),
        ({"height": 8}, "greater than or equal to 16"),
        ({"mask_strategy": "0,1"}, "expected placements of reference 0"),
        ({"mask_strategy": "x"}, "mask_strategy: expected groups"),
        ({"attention_backend": "flash"}, "'sdpa' or 'xformers'"),
        ({"guidance": 3}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelSettings(**changes)


def test_a_condition_of_another_size(condition):
    model = quietly(package.load_model, settings_of(height=64))
    with pytest.raises(ValueError, match=r"condition: expected image latents \[B, 4, 1, 8, 6\] for a video of 64x48"):
        model.initial(condition, generators(2))


def test_too_few_generators(condition, model):
    with pytest.raises(ValueError, match="generator: expected one for each of 2 samples, got 1"):
        model.initial(condition, generators(1))


def test_latents_of_another_clip(model):
    with pytest.raises(ValueError, match="latents: expected 5 latent frames for num_frames=17, got 6"):
        model.decode(torch.zeros(1, 4, 6, 4, 6))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(1, 3, 32, 48), ["a"], [""]), r"images: expected \[B, 3, 36, 48\], got \[1, 3, 32, 48\]"),
        ((torch.zeros(1, 3, 36, 48), ["a", "b"], [""]), "prompts: expected one prompt and one negative prompt"),
        ((torch.zeros(1, 3, 36, 48), [" "], [""]), r"prompts\[0\]: expected a description of the video"),
        ((torch.zeros(2, 3, 36, 48), ["a", "b"], ["", "c"]), "negative_prompts: expected all of them empty or none"),
    ],
)
def test_inputs_of_the_encoder_that_do_not_fit(inputs, message):
    encoder = quietly(package.load_encoder, settings_of())
    with pytest.raises(ValueError, match=message):
        quietly(encoder.encode, *inputs, 36, 48, 17)


def test_negative_prompt_takes_the_place_of_the_null_caption(condition, model):
    encoder = quietly(package.load_encoder, settings_of())
    images = torch.rand(2, 3, 36, 48, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat on a mat", "two dogs run after a ball"]
    other = quietly(encoder.encode, images, prompts, ["ugly", "blurred and dark"], 36, 48, 17)
    assert torch.equal(other.text, condition.text)
    state, step = model.initial(condition, generators(2)), model.schedule(4, 36, 48, 17)[1]
    with torch.no_grad():
        velocities = [model.velocity(state, step, each) for each in (condition, other)]
        alone = [
            model.velocity(model.initial(each, [generators(2)[i]]), step, each) for i, each in enumerate(other.split())
        ]
    assert (velocities[0] - velocities[1]).abs().max() > 1e-4
    torch.testing.assert_close(velocities[1], torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("passes", "branches"), [("joint", [4]), ("separate", [2, 2])])
def test_branches_that_a_backward_may_recompute(condition, passes, branches):
    """As many as there are forwards, each of the latents alone, and the velocity is theirs."""
    model = quietly(package.load_model, settings_of(guidance_passes=passes))
    state, step = model.initial(condition, generators(2)), model.schedule(4, 36, 48, 17)[1]
    sizes = []

    def see(branch, latents):
        assert latents is state.latents
        output = branch(latents)
        sizes.append(len(output))
        return output

    with torch.no_grad():
        assert torch.equal(model.velocity(state, step, condition, None, see), model.velocity(state, step, condition))
    assert sizes == branches


def test_fingerprint_names_what_encodings_depend_on():
    def fingerprint(**changes) -> str:
        return quietly(package.load_encoder, settings_of(**changes)).fingerprint

    assert fingerprint() == fingerprint(fps=12, guidance_scale=3)
    changed = [
        {"aesthetic_score": 5.0},
        {"motion_score": 1.0},
        {"vae_dtype": "bfloat16"},
        {"text_encoder_dtype": "float32"},
    ]
    assert len({fingerprint(), *(fingerprint(**change) for change in changed)}) == 5
