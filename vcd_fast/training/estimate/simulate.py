"""A training step on the meta device: the code of a run itself, with every tensor's size and none of its values.

What a step takes is linear in the number of blocks and in the number of differentiated steps, once there are a few of them, so a step of
a shortened model is followed and the rest extrapolated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vcd_fast.models.base import I2VModel, family
from vcd_fast.models.lora import add_lora
from vcd_fast.rewards.base import RewardInput, RewardOutput
from vcd_fast.training.estimate.meta_kernels import MetaKernels
from vcd_fast.training.estimate.reward import CountedReward
from vcd_fast.training.estimate.stand_ins import StandIns, offloading_to_nowhere
from vcd_fast.training.estimate.tracker import MemoryTracker, Peaks
from vcd_fast.training.settings import RunConfig
from vcd_fast.training.step import Batch, PhaseClock, micro_step

BLOCKS = (4, 6)
"""lengths of the shortened models that longer ones are extrapolated from"""
STEPS = (2, 3)
"""numbers of differentiated steps, the same way"""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a step was seen to take beside weights, gradients and optimizer, in bytes."""

    peaks: Peaks
    saved: dict[str, int]
    """what is kept for the backward: `window` at the end of the rollout, `decode` after decoding"""
    tokens: int
    """the input of a block, both branches of guidance"""
    lora: int
    """numbers in the LoRA"""


def count_window(config: RunConfig) -> Counts:
    """Rollout and backward of a step, its phases `rollout` and `backward`.

    Raises:
        ValueError, OSError: what would stop the run at its start; see `load_meta`.
    """
    blocks = depth_of(family(config.family).shaped_model(config.model))
    plan, steps = config.rollout.plan(), config.rollout.sampling_steps
    # Where the input gradient is stopped there is one graph at a time, but every step from the first differentiated one on, which
    # may be the first of all where steps are drawn, leaves its latents and velocity.
    chosen = steps if plan.stop_input_gradient and plan.draws else plan.count or steps

    def at_depth(depth: int) -> Counts:
        return _linear(lambda k: follow(config, depth, k, judged=False), STEPS, chosen)

    return _linear(at_depth, BLOCKS, blocks)


def count_decode(config: RunConfig) -> Counts:
    """Decode and reward of a step, and samples: its phases `decode`, `reward` and `samples`, without what is kept of the window."""
    small = config.rollout.model_copy(
        update={"backprop": "last:1", "stop_input_gradient": None, "checkpointing": "both"}
    )
    counts = follow(dataclasses.replace(config, rollout=small), depth=1)
    peaks = {
        phase: {part: size for part, size in counts.peaks[phase].items() if part not in ("window", "rollout")}
        for phase in ("decode", "reward", "samples")
    }
    return dataclasses.replace(counts, peaks=peaks)


def _linear(count: Callable[[int], Counts], at: tuple[int, int], wanted: int) -> Counts:
    low, high = at
    if wanted <= high:
        return count(wanted)
    a, b = count(low), count(high)

    def extend(x: int, y: int) -> int:
        return y + (y - x) * (wanted - high) // (high - low)

    def mapping(x: dict[str, int], y: dict[str, int]) -> dict[str, int]:
        return {name: extend(x.get(name, 0), y.get(name, 0)) for name in {**x, **y}}

    peaks = {phase: mapping(a.peaks[phase], b.peaks[phase]) for phase in b.peaks}
    return Counts(peaks, mapping(a.saved, b.saved), extend(a.tokens, b.tokens), extend(a.lora, b.lora))


def follow(
    config: RunConfig, depth: int | None = None, chosen: int = 1, *, judged: bool = True, device: str = "cuda"
) -> Counts:
    """Run one micro-step on the meta device.

    Args:
        depth: blocks the transformer is shortened to; None: all.
        chosen: differentiated steps, the last ones, after one without gradient.
        judged: whether the video is decoded and judged; if not, nothing stands for it.
        device: whose rules of autocast hold, "cuda" or "cpu".
    """
    package, settings, size = family(config.family), config.training, config.model
    model = package.shaped_model(size)
    if depth is not None:
        for blocks in _lists(model.transformer):
            del blocks[depth:]
    parameters = list(add_lora(model, config.lora, seed=0).values())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    dtype = getattr(torch, size.dtype)
    stand_ins = StandIns(None if dtype == torch.float32 else dtype, device)
    reward = CountedReward(config.reward)
    condition = package.shaped_condition(model, settings.batch_size)
    image = torch.empty(settings.batch_size, 3, size.height, size.width, device="meta")
    generators = [torch.Generator() for _ in range(settings.batch_size)]
    batch = Batch(condition, image, [""] * len(image), generators, generators, torch.Generator(), 0)
    watch = Watch(model)
    inputs = [*condition._tensors().values(), image, *reward.weights, *(p.grad for p in parameters)]
    watch.tracker.ignore([*_tensors(model.transformer), *_tensors(model.vae), *inputs])
    plan = config.rollout.plan()
    with contextlib.ExitStack() as around:
        around.enter_context(watch.tokens())
        around.enter_context(_kept_out_of_autocast(model.transformer, stand_ins))
        around.enter_context(offloading_to_nowhere())
        around.enter_context(stand_ins)
        around.enter_context(watch.tracker)
        micro_step(
            model if judged else _Undecoded(model),
            watch.forward(_under(stand_ins.forward, model.transformer)),
            _under(stand_ins.backward, torch.Tensor.backward),
            model.schedule(chosen + 1, size.height, size.width, size.num_frames),
            dataclasses.replace(plan, kind="last", count=chosen),
            reward if judged else _Unjudged(),
            batch,
            scale=1.0,
            agree=lambda flag: flag,
            clock=watch.clock,
        )
        if judged:
            watch.sample()
    without_graph = chosen + 1 if plan.stop_input_gradient else 1
    return Counts(
        watch.tracker.peaks, watch.saved, watch.tokens_seen // without_graph, sum(p.numel() for p in parameters)
    )


class _Undecoded:
    """A model whose videos are a few pixels."""

    def __init__(self, model: I2VModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, latents: Tensor, frames: Sequence[int] | None = None, *, checkpoint: bool = True) -> Tensor:
        return latents.new_zeros(1, 1, 3, 8, 8) + latents.sum()


class _Unjudged:
    def frames_wanted(self, num_frames: int, generator: torch.Generator) -> Tensor:
        return torch.tensor([1])

    def __call__(self, inputs: RewardInput) -> RewardOutput:
        return RewardOutput(inputs.video.flatten(1).sum(1), {})


_KERNELS = MetaKernels()


class Watch:
    """Books what is allocated under the part of the step that it is for."""

    def __init__(self, model: I2VModel) -> None:
        self.model = model
        self.tracker = MemoryTracker(self._part, _KERNELS)
        self.clock = _Clock(self)
        self.saved: dict[str, int] = {}
        self.tokens_seen = 0
        self._in_graph = False

    def _part(self) -> str:
        """A rollout is what runs without gradients; the window's graph and its backward are the window."""
        phase = self.clock.current or "rollout"
        if phase == "backward" or (phase == "rollout" and (self._in_graph or torch.is_grad_enabled())):
            return "window"
        return "decode" if phase == "samples" else phase

    def forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, the transformer. Whether it builds a graph is asked here; inside an autograd.Function the answer is always no."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            before, self._in_graph = self._in_graph, torch.is_grad_enabled()
            try:
                return function(*arguments, **keywords)
            finally:
                self._in_graph = before

        return call

    def left(self, phase: str) -> None:
        """Called when a phase ends. The graph of the window is complete after the rollout, that of the decode after its first half."""
        part = {"rollout": "window", "decode": "decode"}.get(phase)
        if part is not None:
            self.saved.setdefault(part, self.tracker.alive.get(part, 0))

    @contextlib.contextmanager
    def tokens(self) -> Iterator[None]:
        """Counts what enters the blocks in steps without gradients."""

        def see(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            if not torch.is_grad_enabled():
                tokens = arguments[0] if arguments else keywords["hidden_states"]
                self.tokens_seen += tokens.nbytes

        handle = self.model.blocks[0].register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def sample(self) -> None:
        """Decode a whole clip, as samples are shown and judged on the way."""
        condition = family(self.model.family).shaped_condition(self.model, 1)
        latents = self.model.initial(condition, [torch.Generator()]).latents
        with self.clock.phase("samples"):
            self.model.decode(latents, None, checkpoint=False)


class _Clock(PhaseClock):
    def __init__(self, watch: Watch) -> None:
        super().__init__(torch.device("meta"))
        self._watch = watch

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), self._watch.tracker.phase(name):
            yield
        self._watch.left(name)


def _under(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with context():
            return function(*arguments, **keywords)

    return call


@contextlib.contextmanager
def _kept_out_of_autocast(transformer: nn.Module, stand_ins: StandIns) -> Iterator[None]:
    """As the engine does (`engine._keep_out_of_autocast`): the parts that stay in float32 compute in it."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    changed = [module for name, module in transformer.named_modules() if name.rpartition(".")[2] in kept]
    for module in changed:
        module.forward = _under(stand_ins.without_autocast, module.forward)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


_BLOCKS = ("blocks", "spatial_blocks", "temporal_blocks")


def _lists(transformer: nn.Module) -> list[nn.ModuleList]:
    return [getattr(transformer, name) for name in _BLOCKS if hasattr(transformer, name)]


def depth_of(model: I2VModel) -> int:
    """Blocks, or pairs of them where they alternate."""
    return len(_lists(model.transformer)[0])
