"""The hooks on stock pipelines, what they refuse, and what Open-Sora's indicator sees."""

import copy
import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanImageToVideoPipeline

from vcd_fast.models.opensora.blocks import Block
from vcd_fast.models.wan.tiny import tiny_components
from vcd_fast.rollout.plan import Plan, RolloutSettings
from vcd_fast.rollout.sampler import rollout
from vcd_fast.rollout.step_cache import StepCacheConfig, apply_step_cache, remove_step_cache
from vcd_fast.rollout.step_cache.build import build_step_cache, timesteps_of
from vcd_fast.rollout.step_cache.coefficients import PUBLISHED, find, published_name, save
from vcd_fast.rollout.step_cache.drift import measure_drift
from vcd_fast.rollout.step_cache.indicators import indicator_for

STEPS = 8


@pytest.fixture(scope="module")
def stock(image):
    """stock(pipe) -> video of the stock pipeline, with its own noise levels."""

    def call(pipe, **changes):
        options = {
            "image": image,
            "prompt": "a cat runs",
            "height": 32,
            "width": 32,
            "num_frames": 9,
            "num_inference_steps": STEPS,
            "guidance_scale": 5.0,
            "output_type": "pt",
        }
        return pipe(generator=torch.Generator().manual_seed(1), **{**options, **changes}).frames

    return call


def pipeline(image_encoder):
    pipe = WanImageToVideoPipeline(**copy.deepcopy(tiny_components(image_encoder)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Runs:
    """Counts the forwards of a block that really run."""

    def __init__(self, block):
        self.count = 0
        block.attn1.register_forward_hook(self)

    def __call__(self, *ignored):
        self.count += 1


@pytest.mark.parametrize("image_encoder", [True, False])
def test_a_stock_pipeline(stock, half, image_encoder):
    pipe = pipeline(image_encoder)
    full = stock(pipe)
    cache = apply_step_cache(pipe.transformer, half(num_inference_steps=STEPS, threshold=0.7))
    runs = Runs(pipe.transformer.blocks[1])
    cached = stock(pipe)
    assert 4 <= runs.count < 2 * STEPS
    assert runs.count % 2 == 0  # as many in both branches
    assert 0 < (cached - full).abs().mean() < 0.1
    again = stock(pipe)
    assert torch.equal(again, cached)
    with cache.paused():
        assert torch.equal(stock(pipe), full)
    remove_step_cache(pipe.transformer)
    assert torch.equal(stock(pipe), full)
    assert not pipe.transformer.is_cache_enabled


def test_an_interrupted_video_leaves_nothing_for_the_next(stock, half):
    pipe = pipeline(False)
    apply_step_cache(pipe.transformer, half(num_inference_steps=STEPS, threshold=0.7))
    expected = stock(pipe)

    def interrupt(pipe, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        stock(pipe, callback_on_step_end=interrupt)
    assert torch.equal(stock(pipe), expected)


def test_the_number_of_steps_has_to_be_right(stock, half):
    pipe = pipeline(False)
    apply_step_cache(pipe.transformer, half())
    with pytest.raises(ValueError, match="was not told how many steps"):
        stock(pipe)
    remove_step_cache(pipe.transformer)
    apply_step_cache(pipe.transformer, half(num_inference_steps=4))
    with pytest.raises(ValueError, match="told 4 steps, and there are more"):
        stock(pipe)


def test_two_caches_are_refused(make_model, half):
    transformer = make_model(lora=False).transformer
    with pytest.raises(ValueError, match="no step cache was applied"):
        remove_step_cache(transformer)
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"enabled already .FirstBlockCacheConfig"):
        apply_step_cache(transformer, half())


def test_gradients_that_would_be_missing_are_refused(cached, condition, schedule_of):
    model, cache = cached()
    schedule = schedule_of(model, STEPS)
    timesteps = [step.timestep for step in schedule]
    with pytest.raises(ValueError, match=r"none of the steps 6\.\.6 that carry gradients is computed"):
        cache.begin(timesteps[:7], recomputed_from=6)
    # By hand, past that check: a graph in step 1, which the rule skips.
    cache.begin(timesteps)
    state = model.initial(condition, [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        model.velocity(state, schedule[0], condition)
    with pytest.raises(ValueError, match="step 1 builds a graph and repeats the effect of a step that built none"):
        model.velocity(state, schedule[1], condition)
    with (
        model.transformer.cache_context("cond"),
        pytest.raises(ValueError, match="expected step_index where gradients"),
    ):
        model.transformer(
            hidden_states=torch.zeros(1, 36, 3, 4, 4),
            timestep=torch.ones(1),
            encoder_hidden_states=condition.prompt_embeds,
            encoder_hidden_states_image=condition.image_embeds,
        )


def test_a_wan_plan_is_what_is_decided_step_by_step(cached, make_model, half, condition, schedule_of):
    model, cache = cached()
    schedule = schedule_of(model, 30)
    timesteps = [step.timestep for step in schedule]
    plan = cache.plan(timesteps)
    start = model.initial(condition, [torch.Generator().manual_seed(0)])
    cache.begin(timesteps)  # from the plan
    with torch.no_grad():
        state = start
        for step in schedule:
            state = model.advance(state, model.velocity(state, step, condition), step)
    assert cache.decisions == plan
    other = make_model()
    live = apply_step_cache(other.transformer, half(num_inference_steps=30))  # from the timesteps, as they come
    with torch.no_grad():
        assert torch.equal(rollout(other, condition, start, schedule, Plan()), state.latents)
    assert live.decisions == plan
    assert plan[:3] == (True, False, False)
    assert f"{sum(plan)} of 30 steps computed" in cache.describe(timesteps)


def test_decisions_that_depend_on_latents_are_agreed_on(make_opensora):
    model, condition = make_opensora()
    asked = []

    def agree(flag):
        asked.append(flag)
        return len(asked) == 2

    config = StepCacheConfig(coefficients=(1.0, 0.0), threshold=1e9, agree=agree)
    cache = apply_step_cache(model.transformer, config)
    schedule = model.schedule(6, 32, 48, 17)
    cache.begin([step.timestep for step in schedule])
    state = model.initial(condition, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in schedule:
            state = model.advance(state, model.velocity(state, step, condition), step)
    assert cache.decisions == (True, False, True, False, False, True)
    assert asked == [False] * 4
    assert cache.plan([step.timestep for step in schedule]) is None
    assert "as the latents say" in cache.describe([1.0, 0.5])


def test_opensora_indicator_is_what_the_first_block_attends_to(make_opensora, monkeypatch):
    model, condition = make_opensora()
    net, seen = model.transformer, []
    original = Block._attend

    def attend(block, hidden_states, rope):
        if block is net.spatial_blocks[0]:
            seen.append(hidden_states)
        return original(block, hidden_states, rope)

    monkeypatch.setattr(Block, "_attend", attend)
    arguments = {
        "hidden_states": torch.randn(2, 4, 5, 4, 6, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([700.0, 300.0]),
        "encoder_hidden_states": condition.text.expand(2, -1, -1),
        "height": 32,
        "width": 48,
        "fps": 24.0,
    }
    with torch.no_grad():
        net(**arguments)
    found = indicator_for(net, "non-ret")(net, arguments)
    torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-5)


class TestCoefficients:
    def test_published_sets_are_found_by_shape_and_name(self, make_model, make_opensora):
        transformer = make_model(lora=False).transformer

        def shaped(**config):
            other = copy.copy(transformer)
            other._internal_dict = type(transformer.config)({**transformer.config, **config})
            return other

        small = {"num_layers": 30, "num_attention_heads": 12}
        large = {"num_layers": 40, "num_attention_heads": 40}
        assert published_name(shaped(**small)) == "wan2.1-fun-1.3b"
        assert published_name(shaped(**small, in_channels=16)) == "wan2.1-t2v-1.3b"
        assert published_name(shaped(**large, in_channels=16)) == "wan2.1-t2v-14b"
        assert published_name(shaped(**large), "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers") == "wan2.1-i2v-14b-480p"
        assert published_name(shaped(**large, _name_or_path="x/wan-720p")) == "wan2.1-i2v-14b-720p"
        assert published_name(shaped(**large), "/models/wan") is None
        assert published_name(make_opensora()[0].transformer) is None
        found = find(shaped(**small))
        assert (found.mode, found.threshold) == ("ret", 0.1)
        assert found.values == PUBLISHED["wan2.1-t2v-1.3b", "ret"].values
        with pytest.raises(ValueError, match="no default was published"):
            StepCacheConfig(coefficients="wan2.1-i2v-14b-720p").rule(transformer)

    def test_unknown_models_are_refused(self, make_model):
        transformer = make_model(lora=False).transformer
        with pytest.raises(
            ValueError, match=r"no coefficients are known for WanTransformer3DModel, num_layers 2.*vcd calibrate"
        ):
            apply_step_cache(transformer, StepCacheConfig())
        with pytest.raises(ValueError, match=r"open-sora-1\.2 has coefficients for the mode non-ret, not for ret"):
            find(transformer, "ret", "open-sora-1.2")
        with pytest.raises(ValueError, match="knows WanTransformer3DModel and STDiT3, got Linear"):
            apply_step_cache(torch.nn.Linear(1, 1), StepCacheConfig(coefficients=(1.0,), threshold=1.0))

    def test_files(self, make_model, make_opensora, tmp_path):
        transformer = make_model(lora=False).transformer
        path = save(tmp_path / "fit.json", transformer, (1.0, 0.0), "ret", {"r_squared": 0.5})
        assert find(transformer, None, str(path)).values == (1.0, 0.0)
        with pytest.raises(ValueError, match=r"was calibrated on WanTransformer3DModel, num_layers 2.*not on STDiT3"):
            find(make_opensora()[0].transformer, None, str(path))
        with pytest.raises(ValueError, match="in the mode ret, not non-ret"):
            find(transformer, "non-ret", str(path))
        with pytest.raises(FileNotFoundError, match=r"expected a file of `vcd calibrate` or one of open-sora-1\.2"):
            find(transformer, None, "wan2.1-i2v-14b")
        for text in ("{", "[1]", json.dumps({"format": "other"}), path.read_text().replace("1.0", "NaN")):
            (tmp_path / "bad.json").write_text(text)
            with pytest.raises(ValueError, match=r"bad.json: expected a file of `vcd calibrate`"):
                find(transformer, None, str(tmp_path / "bad.json"))


def test_settings_switch_it_on_for_training_alone(make_model, condition, tmp_path):
    model = make_model(lora=False)
    assert build_step_cache(model, RolloutSettings(sampling_steps=STEPS)) is None
    path = save(tmp_path / "fit.json", model.transformer, (1.0, 0.0), "ret", {})
    settings = {"sampling_steps": STEPS, "step_cache": "teacache", "cache_coefficients": str(path)}
    with pytest.raises(ValueError, match="cache_threshold"):
        build_step_cache(model, RolloutSettings(**settings))
    assert not model.transformer.is_cache_enabled
    cache = build_step_cache(model, RolloutSettings(**settings, cache_threshold=0.5))
    assert cache.rule.first == 5
    start = model.initial(condition, [torch.Generator().manual_seed(0)])
    schedule = model.schedule(STEPS, 32, 32, 9)
    with torch.no_grad():
        rollout(model, condition, start, schedule, Plan())
    assert cache.decisions == ()
    drift = measure_drift(model, condition, [0], STEPS, cache)
    assert (drift.computed, drift.steps) == (sum(cache.plan(timesteps_of(model, STEPS))), STEPS)
    assert 0 < drift.latents < 1
    assert not cache.active
    everything = measure_drift(model, condition, [0], STEPS, cache, compute_at=range(STEPS))
    assert (everything.latents, everything.computed) == (0, STEPS)
