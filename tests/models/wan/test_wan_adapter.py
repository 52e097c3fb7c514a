import json
import shutil

import pytest
import torch
from torch import nn

from vcd_fast.models.base import Step
from vcd_fast.models.wan import LORA_TARGETS, load_model
from vcd_fast.models.wan.tiny import save_tiny_pipeline, tiny_transformer

STEP = Step(index=2, timestep=750.0, sigma=0.75, dt=-0.25)
KEPT_IN_FLOAT32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "rope"}


class Recorder:
    """Stands in for a transformer: remembers what it was called with."""

    def __init__(self, transformer=None):
        self.transformer, self.calls = transformer, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs, torch.is_grad_enabled()))
        if self.transformer is not None:
            return self.transformer(*args, **kwargs)
        return (kwargs["hidden_states"][:, :16] * kwargs["encoder_hidden_states"].sum(),)


@pytest.fixture(scope="module")
def state(model, condition):
    return model.initial(condition, [torch.Generator().manual_seed(seed) for seed in (3, 4)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_modules_kept_in_float32_stay_so(make_model, pipeline_folder, dtype):
    in_code, in_folder = make_model(dtype=dtype), make_model(dtype=dtype, weights=str(pipeline_folder))
    for model in (in_code.to("cpu"), in_folder.to("cpu")):
        for name, parameter in model.transformer.named_parameters():
            expected = torch.float32 if KEPT_IN_FLOAT32 & set(name.split(".")) else getattr(torch, dtype)
            assert parameter.dtype == expected, name
            assert not parameter.requires_grad
    assert {p.dtype for p in in_code.vae.parameters()} == {torch.float32}
    pairs = zip(in_code.transformer.state_dict().items(), in_folder.transformer.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("weights", ["tiny-random", "tiny-random-no-image-encoder"])
def test_a_folder_gives_what_the_same_weights_in_code_give(make_model, tmp_path, encode, weights):
    folder = save_tiny_pipeline(tmp_path / "pipeline", image_encoder=weights == "tiny-random")
    condition = encode(weights)
    found = []
    for model in (make_model(weights=weights), make_model(weights=str(folder))):
        state = model.initial(condition, torch.Generator().manual_seed(0))
        found.append(model.decode(model.velocity(state, STEP, condition)))
    assert torch.equal(*found)


def test_a_tiny_pipeline_is_not_written_over(pipeline_folder):
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        save_tiny_pipeline(pipeline_folder)


def test_the_tiny_model_is_the_same_every_time_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny_transformer().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = tiny_transformer().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_random_weights_are_announced(settings):
    with pytest.warns(UserWarning, match="these weights are random"):
        load_model(settings())


def test_text_to_video_weights_are_refused(pipeline_folder, settings, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "in_channels": 16}))
    with pytest.raises(ValueError, match=r"image-to-video transformer with 36 input channels.*got 16"):
        load_model(settings(weights=str(folder)))


def test_attention_backends_go_through_the_dispatcher(make_model, state, condition):
    plain = make_model()
    chosen = make_model(attention_backend="_native_math")
    assert {b.attn1.processor._attention_backend.value for b in plain.blocks} == {"native"}
    assert {b.attn1.processor._attention_backend.value for b in chosen.blocks} == {"_native_math"}
    a, b = (m.velocity(state, STEP, condition) for m in (plain, chosen))
    assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match=r"model.attention_backend: expected sdpa or one of .*xformers.* got 'turbo'"):
        make_model(attention_backend="turbo")
    with pytest.raises(ImportError, match=r"model.attention_backend=sage cannot be used here: .* `sdpa` always can"):
        make_model(attention_backend="sage")


def test_noise_of_a_sample_does_not_depend_on_its_batch(model, condition, state):
    alone = model.initial(condition.split()[1], [torch.Generator().manual_seed(4)])
    assert state.latents.shape == (2, 16, 3, 4, 6)
    assert state.latents.dtype == torch.float32
    assert torch.equal(alone.latents, state.latents[1:])
    whole = model.initial(condition, torch.Generator().manual_seed(3)).latents
    assert torch.equal(whole, torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="generator: expected one for each of 2 samples, got 1"):
        model.initial(condition, [torch.Generator()])


def test_guidance_combines_both_branches_in_float32(make_model, condition, state):
    model = make_model(dtype="bfloat16")
    conditional = make_model(dtype="bfloat16", guidance_scale=1).velocity(state, STEP, condition)
    swapped = type(condition)(
        condition.negative_prompt_embeds, condition.prompt_embeds, condition.latents, condition.image_embeds
    )
    unconditional = make_model(dtype="bfloat16", guidance_scale=1).velocity(state, STEP, swapped)
    velocity = model.velocity(state, STEP, condition)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, unconditional + 5.0 * (conditional - unconditional))


def test_what_the_transformer_is_told(model, condition, state):
    recorder = Recorder()
    model.velocity(state, STEP, condition, recorder)
    assert len(recorder.calls) == 2
    for (args, kwargs, _), prompt in zip(
        recorder.calls, (condition.prompt_embeds, condition.negative_prompt_embeds), strict=True
    ):
        assert args == ()
        assert set(kwargs) == {
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_hidden_states_image",
            "return_dict",
        }
        assert torch.equal(kwargs["hidden_states"], torch.cat([state.latents, condition.latents], 1))
        assert kwargs["timestep"].tolist() == [750.0, 750.0]
        assert torch.equal(kwargs["encoder_hidden_states"], prompt)
        assert torch.equal(kwargs["encoder_hidden_states_image"], condition.image_embeds)


def test_a_wrapper_is_called_exactly_like_the_transformer(model, condition, state, monkeypatch):
    wrapper = Recorder(model.transformer)
    through = model.velocity(state, STEP, condition, wrapper)
    inner = Recorder(model.transformer.forward)
    monkeypatch.setattr(model.transformer, "forward", inner)
    assert torch.equal(model.velocity(state, STEP, condition), through)
    assert len(inner.calls) == len(wrapper.calls) == 2
    for (args, kwargs, grad), (args_, kwargs_, grad_) in zip(inner.calls, wrapper.calls, strict=True):
        assert (args, grad) == (args_, grad_)
        assert kwargs.keys() == kwargs_.keys()
        for key, value in kwargs.items():
            same = torch.equal(value, kwargs_[key]) if isinstance(value, torch.Tensor) else value == kwargs_[key]
            assert same, key


def test_guidance_of_one_runs_one_branch(make_model, condition, state):
    recorder = Recorder()
    make_model(guidance_scale=1).velocity(state, STEP, condition, recorder)
    assert len(recorder.calls) == 1


def test_the_unconditional_branch_may_be_left_without_gradient(make_model, condition, state):
    gradients = []
    for choice in ("both", "conditional"):
        recorder = Recorder()
        latents = state.latents.clone().requires_grad_()
        model = make_model(guidance_gradient=choice)
        velocity = model.velocity(type(state)(latents), STEP, condition, recorder)
        assert [grad for _, _, grad in recorder.calls] == [True, choice == "both"]
        velocity.sum().backward()
        gradients.append(latents.grad)
    conditional, unconditional = condition.prompt_embeds.sum(), condition.negative_prompt_embeds.sum()
    assert torch.allclose(gradients[0], (5 * conditional - 4 * unconditional).expand_as(latents), rtol=1e-4)
    assert torch.allclose(gradients[1], (5 * conditional).expand_as(latents), rtol=1e-4)


def test_block_checkpointing_is_switched_and_restored(model):
    assert not model.transformer.gradient_checkpointing
    with model.block_checkpointing(True):
        assert model.transformer.gradient_checkpointing
        with model.block_checkpointing(False):
            assert not model.transformer.gradient_checkpointing
        assert model.transformer.gradient_checkpointing
    assert not model.transformer.gradient_checkpointing
    assert list(model.blocks) == list(model.transformer.blocks)


def test_lora_targets_name_layers_of_the_published_1_3b_model():
    """The configuration of Wan2.1-Fun-1.3B-InP, 983 keys and 1,564,428,608 parameters, without its weights."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=36,
            out_channels=16,
            ffn_dim=8960,
            num_layers=30,
            image_dim=1280,
            added_kv_proj_dim=1536,
        )
    assert len(transformer.state_dict()) == 983
    assert sum(p.numel() for p in transformer.parameters()) == 1_564_428_608
    linear = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    rank = 32
    counts, parameters = {}, {}
    for key, targets in LORA_TARGETS.items():
        chosen = [m for name, m in linear.items() if any(name.endswith(f".{target}") for target in targets)]
        counts[key] = len(chosen)
        parameters[key] = sum(rank * (m.in_features + m.out_features) for m in chosen)
    assert counts["default"] == counts["attention"] == 30 * 8
    assert counts["attention+image"] == 30 * 10
    assert counts["attention+image+ffn"] == 30 * 12
    assert parameters["default"] == 23_592_960
