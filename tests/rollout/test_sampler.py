import dataclasses

import pytest
import torch

from vcd_fast.models.base import Schedule, State, Step
from vcd_fast.models.lora import lora_parameters
from vcd_fast.rollout.plan import Plan
from vcd_fast.rollout.sampler import rollout, run

SAMPLING_STEPS = 4
FRAMES = [0, 3, 6]
PLANS = ["last:1", "last:2", "random:2", "spaced:2", "all"]
CHECKPOINTING = ["none", "block", "step", "both"]


@pytest.fixture(scope="module")
def start(model, condition):
    """Condition, noise, schedule: what every rollout here begins with."""
    schedule = model.schedule(SAMPLING_STEPS, 32, 32, 9)
    return condition, model.initial(condition, [torch.Generator().manual_seed(0)]), schedule


@pytest.fixture(scope="module")
def weights():
    """A linear loss of the final latents, so that no decode is needed: <x_N, weights>."""
    return torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def draws(seed=7):
    return torch.Generator().manual_seed(seed)


def gradients(model):
    found = {name: p.grad.clone() for name, p in lora_parameters(model).items() if p.grad is not None}
    model.transformer.zero_grad(set_to_none=True)
    return found


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if tolerance:
            assert torch.allclose(value, b[name], **tolerance), name
        else:
            assert torch.equal(value, b[name]), name
    return True


def backward_of_rollout(model, start, plan, weights, **options):
    condition, state, schedule = start
    latents = rollout(model, condition, state, schedule, plan, generator=draws(), **options)
    (latents * weights).sum().backward()
    return latents.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:])
@pytest.mark.parametrize("backprop", PLANS)
def test_checkpointing_changes_no_bit(model, start, plan, weights, backprop, checkpointing):
    latents, expected = backward_of_rollout(model, start, plan(backprop, checkpointing="none"), weights)
    again, found = backward_of_rollout(model, start, plan(backprop, checkpointing=checkpointing), weights)
    assert torch.equal(latents, again)
    assert same(found, expected)
    assert len(found) == len(lora_parameters(model)) == 32
    assert all(bool((value != 0).any()) for value in found.values())
    assert not model.transformer.gradient_checkpointing


@pytest.mark.parametrize("backprop", PLANS)
def test_gradients_do_not_change_the_sample(model, start, plan, weights, backprop):
    condition, state, schedule = start
    before = state.latents.clone()
    latents, _ = backward_of_rollout(model, start, plan(backprop), weights)
    with torch.no_grad():
        plain = rollout(model, condition, state, schedule, plan(backprop))  # draws nothing, so needs no generator
    assert torch.equal(latents, plain)
    assert not plain.requires_grad
    assert torch.equal(state.latents, before)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("backprop", PLANS)
def test_surrogates_add_up_to_one_backward(model, start, plan, weights, backprop, checkpointing):
    chosen = plan(backprop, checkpointing=checkpointing)
    latents, expected = backward_of_rollout(model, start, chosen, weights)
    condition, state, schedule = start
    result = run(model, condition, state, schedule, chosen, generator=draws())
    assert torch.equal(result.latents, latents)
    assert not result.latents.requires_grad
    assert result.steps == chosen.steps(SAMPLING_STEPS, draws())
    assert result.num_surrogates == (2 if backprop == "spaced:2" else 1)
    count = 0
    for surrogate in result.surrogates(weights):
        assert surrogate.shape == ()
        surrogate.backward()
        count += 1
    assert count == result.num_surrogates
    if count == 1:
        assert same(gradients(model), expected)
    else:  # the same sum in another order
        assert same(gradients(model), expected, rtol=1e-4, atol=1e-7)


def test_stopping_the_input_gradient_changes_nothing_for_one_step(model, start, plan, weights):
    _, one = backward_of_rollout(model, start, plan("last:1"), weights)
    _, stopped = backward_of_rollout(model, start, plan("last:1", stop_input_gradient=True), weights)
    assert same(one, stopped)
    _, two = backward_of_rollout(model, start, plan("last:2"), weights)
    _, stopped = backward_of_rollout(model, start, plan("last:2", stop_input_gradient=True), weights)
    assert any(not torch.allclose(two[name], stopped[name], rtol=1e-2) for name in two)


def test_stopped_gradients_are_the_sum_of_single_steps(model, start, plan, weights):
    """DRTune: with detached inputs every step contributes dt * d<v, g>/dtheta, whatever the others do."""
    condition, state, schedule = start
    _, found = backward_of_rollout(model, start, plan("all", stop_input_gradient=True), weights)
    for step in schedule:
        velocity = model.velocity(state, step, condition)
        (velocity * step.dt * weights).sum().backward()
        state = State(state.latents + step.dt * velocity.detach())
    assert same(gradients(model), found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chosen", [(0,), (1, 3), (0, 2)])
def test_steps_that_were_not_chosen_are_constants(model, start, weights, chosen, monkeypatch):
    """random:K against a loop that spells it out: velocities of other steps are detached, the updates are not."""
    condition, state, schedule = start
    monkeypatch.setattr(Plan, "steps", lambda self, sampling_steps, generator=None: chosen)
    _, found = backward_of_rollout(model, start, Plan("random", len(chosen), checkpointing="none"), weights)
    x = state.latents
    for step in schedule:
        velocity = model.velocity(State(x), step, condition)
        x = x + step.dt * (velocity if step.index in chosen else velocity.detach())
    (x * weights).sum().backward()
    assert same(gradients(model), found)


class Counter:
    """Counts forwards of a transformer with and without a graph."""

    def __init__(self, transformer):
        self.transformer, self.modes = transformer, []

    def __call__(self, *args, **kwargs):
        self.modes.append(torch.is_grad_enabled())
        return self.transformer(*args, **kwargs)


def test_steps_before_the_window_build_no_graph(model, start, plan):
    condition, state, schedule = start
    counter = Counter(model.transformer)
    rollout(model, condition, state, schedule, plan("last:2", checkpointing="none"), forward=counter)
    assert counter.modes == [False] * 4 + [True] * 4  # two branches of guidance a step


def test_terms_are_made_one_at_a_time(model, start, plan, weights):
    condition, state, schedule = start
    counter = Counter(model.transformer)
    result = run(
        model, condition, state, schedule, plan("spaced:2", checkpointing="none"), forward=counter, generator=draws()
    )
    assert counter.modes == [False] * 8
    for done, surrogate in enumerate(result.surrogates(weights), 1):
        assert counter.modes == [False] * 8 + [True] * 2 * done
        surrogate.backward()
    gradients(model)


@pytest.mark.parametrize(("checkpointing", "runs"), [("none", 1), ("block", 2), ("step", 2), ("both", 3)])
def test_what_is_run_again_in_the_backward(model, start, plan, weights, checkpointing, runs, monkeypatch):
    """Of the last step, two branches of guidance; with `both` the recomputed step checkpoints its blocks as well."""
    condition, state, schedule = start
    block, calls = model.blocks[0], []
    forward = block.forward
    latents = rollout(model, condition, state, schedule, plan("last:1", checkpointing=checkpointing))
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    (latents * weights).sum().backward()
    assert len(calls) == 2 * (runs - 1)
    gradients(model)


def saved_by(model, function, *args, **kwargs):
    """Bytes of distinct storages that a call of `function` keeps for a backward, parameters excluded; and its result."""
    excluded = {p.untyped_storage().data_ptr() for p in model.transformer.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function(*args, **kwargs)
    return sum(sizes.values()), kept


def test_memory_of_the_window(model, start, plan):
    condition, state, schedule = start

    def kept(backprop, checkpointing):
        chosen = plan(backprop, checkpointing=checkpointing)
        return saved_by(model, rollout, model, condition, state, schedule, chosen, generator=draws())[0]

    assert kept("last:1", "block") < 0.6 * kept("last:1", "none")
    assert kept("all", "none") > 3.5 * kept("last:1", "none")
    # With steps checkpointed what stays is latents: 16x3x4x4 floats a step, and the condition they meet again.
    assert kept("all", "step") < 0.02 * kept("all", "none")
    assert kept("all", "both") == kept("all", "step")


def test_memory_of_spaced_terms_does_not_depend_on_their_number(model, start, plan, weights):
    condition, state, schedule = start
    most = []
    for count in (1, 2, 4):
        chosen = plan(f"spaced:{count}", checkpointing="none")
        sampled, result = saved_by(model, run, model, condition, state, schedule, chosen, generator=draws())
        assert sampled == 0
        terms = result.surrogates(weights)
        sizes = []
        for _ in range(count):
            size, surrogate = saved_by(model, next, terms)
            sizes.append(size)
            surrogate.backward()
        most.append(max(sizes))
    assert most[0] == most[1] == most[2] > 0
    gradients(model)


def test_on_step_reports(model, start, plan):
    condition, state, schedule = start
    seen = []
    for function, backprop in ((rollout, "last:1"), (run, "last:1"), (run, "spaced:2")):
        seen.clear()
        function(
            model, condition, state, schedule, plan(backprop), generator=draws(), on_step=lambda *a: seen.append(a)
        )
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_errors(model, start, plan):
    condition, state, schedule = start
    with pytest.raises(ValueError, match="generator: random:2 draws steps and needs one"):
        rollout(model, condition, state, schedule, plan("random:2"))
    with pytest.raises(ValueError, match="last:9: expected 1 to 4 of 4 sampling steps"):
        run(model, condition, state, schedule, Plan("last", 9))
    result = run(model, condition, state, schedule, plan("last:1"))
    with pytest.raises(ValueError, match=r"gradient: expected \[1, 16, 3, 4, 4\], got \[1, 16\]"):
        result.surrogates(torch.zeros(1, 16))


# --- a family whose update is not the plain Euler one


@dataclasses.dataclass(frozen=True)
class MaskedState(State):
    mask: torch.Tensor
    reference: torch.Tensor


class MaskedModel:
    """v = w * sin(x); what the mask covers is restored to a reference, and the rest shrinks, after every step."""

    def __init__(self):
        self.w = torch.nn.Parameter(torch.tensor([0.7, -1.3]))
        self.transformer = torch.nn.Identity()

    def block_checkpointing(self, enabled):
        return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()

    def velocity(self, state, step, condition, forward=None, branchwise=None):
        return self.w * torch.sin(state.latents) * step.timestep

    def advance(self, state, velocity, step):
        moved = 0.9 * state.latents + step.dt * velocity
        return dataclasses.replace(state, latents=torch.where(state.mask, state.reference, moved))


@pytest.mark.parametrize("kind", ["last", "random", "spaced", "all"])
@pytest.mark.parametrize("stop", [False, True])
def test_surrogates_follow_the_family_s_own_update(kind, stop):
    model = MaskedModel()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 2, generator=generator)
    state = MaskedState(latents, latents > 1, torch.ones(5, 2))
    schedule = Schedule(tuple(Step(i, 1.0 + i, 1.0, 0.3) for i in range(5)))
    plan = Plan(kind, None if kind == "all" else 3, stop_input_gradient=stop or kind == "spaced")
    weights = torch.randn(5, 2, generator=generator)
    (rollout(model, None, state, schedule, plan, generator=draws()) * weights).sum().backward()
    expected, model.w.grad = model.w.grad, None
    for surrogate in run(model, None, state, schedule, plan, generator=draws()).surrogates(weights):
        surrogate.backward()
    assert torch.allclose(model.w.grad, expected, rtol=1e-5)
    assert bool((expected != 0).all())
