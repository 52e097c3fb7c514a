"""The cached sampler against loops without hooks: values and gradients are equal, bit for bit, however they are recomputed."""

import pytest
import torch

from vcd_fast.models.lora import lora_parameters
from vcd_fast.models.opensora.embeddings import rope_table
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import rollout, run
from vcd_fast.rollout.step_cache import StepCacheConfig, apply_step_cache

STEPS = 8
CHECKPOINTING = ("none", "block", "step", "both")
OPENSORA_THRESHOLD = 0.5


class WanByHand:
    """One velocity after the other: head, blocks or what they did last, tail. No hooks, no checkpointing."""

    def __init__(self, model, condition, detached):
        self.model, self.condition, self.detached = model, condition, detached
        self.effect = {}

    def branch(self, name, latents, step, compute):
        net, condition = self.model.transformer, self.condition
        prompt = condition.prompt_embeds if name == "cond" else condition.negative_prompt_embeds
        hidden = torch.cat([latents, condition.latents], dim=1)
        frames, height, width = hidden.shape[2], hidden.shape[3] // 2, hidden.shape[4] // 2
        rotary = net.rope(hidden)
        tokens = net.patch_embedding(hidden).flatten(2).transpose(1, 2).contiguous()
        time = torch.full((1,), step.timestep)
        time, modulation, text, image = net.condition_embedder(time, prompt, condition.image_embeds)
        text = text if image is None else torch.cat([image, text], dim=1)
        modulation = modulation.unflatten(1, (6, -1))
        if compute:
            before = tokens
            for block in net.blocks:
                tokens = block(tokens, text, modulation, rotary)
            effect = tokens - before
            self.effect[name] = effect.detach() if self.detached else effect
        else:
            tokens = tokens + self.effect[name]
        shift, scale = (net.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        patches = net.proj_out(net.norm_out(tokens.float()) * (1 + scale) + shift)
        patches = patches.reshape(1, frames, height, width, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def velocity(self, latents, step, compute):
        scale = self.model.settings.guidance_scale
        conditional = self.branch("cond", latents, step, compute)
        both = self.model.settings.guidance_gradient == "both"
        with torch.set_grad_enabled(torch.is_grad_enabled() and both):
            unconditional = self.branch("uncond", latents, step, compute)
        return unconditional + scale * (conditional - unconditional)


class OpenSoraByHand:
    """As above; both branches of guidance in one batch."""

    def __init__(self, model, condition, detached):
        self.model, self.condition, self.detached = model, condition, detached
        self.effect = None
        self.seen = []

    def velocity(self, latents, step, compute):
        """The transformer's own forward over blocks that are replaced by one: the loop over them, or their last effect."""
        net, loop = self.model.transformer, list(self.model.blocks)
        spatial, temporal = net.spatial_blocks, net.temporal_blocks

        class Whole(torch.nn.Module):
            def forward(module, tokens, text, modulation, rope=None):
                self.seen.append(tokens.detach())
                if not compute:
                    return tokens + self.effect
                before = tokens
                for index, block in enumerate(loop):
                    tokens = block(tokens, text, modulation, *([self.rope] if index % 2 else []))
                effect = tokens - before
                self.effect = effect.detach() if self.detached else effect
                return tokens

        class Nothing(torch.nn.Module):
            def forward(module, tokens, *others):
                return tokens

        self.rope = rope_table(latents.shape[2], net.head_dim, latents.device)
        net.spatial_blocks, net.temporal_blocks = torch.nn.ModuleList([Whole()]), torch.nn.ModuleList([Nothing()])
        try:
            return self.model.velocity(self.state, step, self.condition)
        finally:
            net.spatial_blocks, net.temporal_blocks = spatial, temporal


def by_hand(kind, model, condition, schedule, computed, first, detached=False):
    """Latents and gradients of a sampler that computes the steps `computed` and has a graph from step `first` on."""
    hand = kind(model, condition, detached)
    state = start(model, condition)
    for step in schedule:
        hand.state = state
        with torch.set_grad_enabled(step.index >= first):
            velocity = hand.velocity(state.latents, step, computed[step.index])
        state = model.advance(state, velocity, step)
    (state.latents * direction(state.latents)).sum().backward()
    return state.latents.detach(), gradients(model)


def start(model, condition):
    return model.initial(condition, [torch.Generator().manual_seed(5)])


def direction(latents):
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))


def gradients(model):
    found = {name: p.grad.clone() for name, p in lora_parameters(model).items() if p.grad is not None}
    model.transformer.zero_grad(set_to_none=True)
    return found


def trained(model, cache, condition, schedule, plan, forward=None):
    """Latents, gradients and which steps were computed, the way training gets them."""
    result = run(model, condition, start(model, condition), schedule, plan, cache=cache, forward=forward)
    for term in result.surrogates(direction(result.latents)):
        term.backward()
    computed = result.computed
    result.close()
    return result.latents, gradients(model), computed


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("count", "checkpointing"), [*((None, each) for each in CHECKPOINTING), (5, "both"), (2, "none"), (2, "both")]
)
def test_wan_equals_a_loop_without_hooks(cached, make_model, condition, schedule_of, count, checkpointing):
    model, cache = cached()
    schedule = schedule_of(model, STEPS)
    plan = Plan("all" if count is None else "last", count, checkpointing=checkpointing)
    for _ in range(2 if count is None else 1):  # the second time shows that nothing is left of the first
        latents, found, computed = trained(model, cache, condition, schedule, plan)
    first = 0 if count is None else STEPS - count
    expected = {None: "C..C.C.C", 5: "C..C.C.C", 2: "C..C.CC."}[count]
    assert "".join("C" if each else "." for each in computed) == expected
    reference, wanted = by_hand(WanByHand, make_model(), condition, schedule, computed, first)
    assert torch.equal(latents, reference)
    assert_equal(found, wanted)


@pytest.mark.parametrize("checkpointing", ["none", "both"])
@pytest.mark.parametrize("settings", [{"guidance_gradient": "conditional"}, {"guidance_scale": 1}])
def test_branches_of_guidance(cached, make_model, condition, schedule_of, settings, checkpointing):
    model, cache = cached(**settings)
    schedule = schedule_of(model, STEPS)
    latents, found, computed = trained(model, cache, condition, schedule, Plan("all", checkpointing=checkpointing))
    hand = make_model(**settings)
    if "guidance_scale" in settings:
        WithOne = type("WithOne", (WanByHand,), {"velocity": lambda self, *args: self.branch("cond", *args)})
        reference, wanted = by_hand(WithOne, hand, condition, schedule, computed, 0)
    else:
        reference, wanted = by_hand(WanByHand, hand, condition, schedule, computed, 0)
    assert torch.equal(latents, reference)
    assert_equal(found, wanted)


def test_without_an_image_encoder(cached, make_model, encode, schedule_of):
    weights = "tiny-random-no-image-encoder"
    condition = encode(weights, ["a cat runs"])
    model, cache = cached(weights=weights)
    schedule = schedule_of(model, STEPS)
    latents, found, computed = trained(model, cache, condition, schedule, Plan("all", checkpointing="both"))
    reference, wanted = by_hand(WanByHand, make_model(weights=weights), condition, schedule, computed, 0)
    assert torch.equal(latents, reference)
    assert_equal(found, wanted)


@pytest.mark.parametrize("checkpointing", ["none", "both"])
def test_a_detached_residual_cuts_the_gradient_and_changes_no_value(
    cached, make_model, half, condition, schedule_of, checkpointing
):
    plan = Plan("all", checkpointing=checkpointing)
    model, cache = cached(half(residual="detached"))
    schedule = schedule_of(model, STEPS)
    latents, found, computed = trained(model, cache, condition, schedule, plan)
    reference, wanted = by_hand(WanByHand, make_model(), condition, schedule, computed, 0, detached=True)
    assert torch.equal(latents, reference)
    assert_equal(found, wanted)
    whole, exact = by_hand(WanByHand, make_model(), condition, schedule, computed, 0)
    assert torch.equal(whole, latents)
    norm = sum(float(value.square().sum()) for value in exact.values()) ** 0.5
    error = sum(float((found[name] - value).square().sum()) for name, value in exact.items()) ** 0.5
    assert error > 0.05 * norm


@pytest.mark.parametrize("plan", [Plan("random", 3), Plan("spaced", 3, stop_input_gradient=True)])
def test_drawn_steps_are_computed(cached, condition, schedule_of, plan):
    model, cache = cached()
    schedule = schedule_of(model, STEPS)
    picked = set()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        result = run(model, condition, start(model, condition), schedule, plan, cache=cache, generator=generator)
        assert all(result.computed[step] for step in result.steps)
        assert not all(result.computed)
        for term in result.surrogates(direction(result.latents)):
            term.backward()
        assert all(bool((value != 0).any()) for value in gradients(model).values())
        picked |= set(result.steps)
        result.close()
    assert len(picked) > 3


def test_spaced_gradients_are_those_of_steps_computed_alone(cached, make_model, condition, schedule_of):
    """Each term is the derivative of one network evaluation at latents that are constants."""
    model, cache = cached()
    schedule = schedule_of(model, STEPS)
    plan = Plan("last", 3, stop_input_gradient=True)
    latents, found, computed = trained(model, cache, condition, schedule, plan)
    assert computed == (True, False, False, True, False, True, True, True)
    hand = WanByHand(make_model(), condition, detached=True)
    state = start(hand.model, condition)
    for step in schedule:
        with torch.set_grad_enabled(step.index >= STEPS - 3):
            velocity = hand.velocity(state.latents.detach(), step, computed[step.index])
        state = hand.model.advance(state, velocity, step)
    (state.latents * direction(latents)).sum().backward()
    assert torch.equal(state.latents.detach(), latents)
    for name, value in gradients(hand.model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_a_wrapper_stands_in_for_the_transformer(cached, condition, schedule_of):
    model, cache = cached()
    plain = trained(model, cache, condition, schedule_of(model, STEPS), Plan("all"))

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapper = Wrapper(model.transformer)
    wrapped = trained(model, cache, condition, schedule_of(model, STEPS), Plan("all"), forward=wrapper)
    assert torch.equal(plain[0], wrapped[0])
    assert_equal(wrapped[1], plain[1])


@pytest.mark.parametrize("checkpointing", ["none", "both"])
def test_opensora_equals_a_loop_without_hooks(make_opensora, checkpointing):
    model, condition = make_opensora()
    config = StepCacheConfig(coefficients=(1.0, 0.0), threshold=OPENSORA_THRESHOLD)
    cache = apply_step_cache(model.transformer, config)
    schedule = model.schedule(STEPS, 32, 48, 17)
    plan = Plan("last", 6, checkpointing=checkpointing)
    latents, found, computed = trained(model, cache, condition, schedule, plan)
    assert 3 <= sum(computed) <= 6
    assert computed[0]
    assert computed[2]
    assert computed[-1]
    assert not all(computed[2:])
    hand, _ = make_opensora()
    reference, wanted = by_hand(OpenSoraByHand, hand, condition, schedule, computed, 2)
    assert torch.equal(latents, reference)
    assert_equal(found, wanted)


def test_pure_rollout_with_a_cache(cached, condition, schedule_of):
    """`rollout` leaves the cache to its caller while there is a graph, and ends it where there is none."""
    model, cache = cached()
    schedule = schedule_of(model, STEPS)
    with torch.no_grad():
        rollout(model, condition, start(model, condition), schedule, Plan("all"), cache=cache)
    assert not cache.active
    latents = rollout(
        model, condition, start(model, condition), schedule, Plan("all", checkpointing="step"), cache=cache
    )
    (latents * direction(latents)).sum().backward()
    found = gradients(model)
    assert cache.decisions.count(True) == 4
    cache.end()
    again = trained(model, cache, condition, schedule, Plan("all"))
    assert torch.equal(latents.detach(), again[0])
    assert_equal(found, again[1])
