"""Run by test_engine.py on two ranks: what an engine does to a small model at every ZeRO stage; prints one JSON line on rank 0."""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn

from vcd_fast.training import engine as engines
from vcd_fast.training.optimizer_state import discard_gradients, gather_moments, gather_parameters, restore_moments
from vcd_fast.training.settings import TrainingSettings

NAMES = ("0.weight", "2.weight", "2.bias")  # odd sizes: the shards of ZeRO-3 are padded


NORMS = {
    "unclipped": {"max_grad_norm": 0.0},
    "clipped at 5": {"max_grad_norm": 5.0},
    "unclipped in bfloat16": {"max_grad_norm": 0.0, "dtype": torch.bfloat16},
}


def flat(tensors):
    return {name: value.flatten().tolist() for name, value in tensors.items()}


def make(stage, values=None, max_grad_norm=0.05, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).requires_grad_(False)
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in NAMES}
    if values is not None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
    settings = TrainingSettings(zero=stage, learning_rate=1e-2, weight_decay=0.01, max_grad_norm=max_grad_norm)
    return engines.build(model, list(parameters.values()), settings, dtype), parameters


def update(engine, step, factor=1.0, backwards=2):
    for micro in range(backwards):
        generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
        loss = engine(torch.randn(2, 6, generator=generator)).pow(2).mean() * factor / backwards
        engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    return engine.was_step_applied()


def state(engine, parameters):
    return gather_parameters(engine, parameters) | gather_moments(engine, parameters)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_process():
    """The same three updates by plain PyTorch on the samples of both ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).requires_grad_(False)
    parameters = [model.get_parameter(name).requires_grad_(True) for name in NAMES]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            for micro in range(2):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
                (model(torch.randn(2, 6, generator=generator)).pow(2).mean() / 4).backward()
        nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
    return {name: p.detach() for name, p in zip(NAMES, parameters, strict=True)}


def main():
    torch.set_num_threads(1)
    engines.init_distributed(torch.device("cpu"))
    found = {}
    reference = one_process()
    for stage in range(4):
        engine, parameters = make(stage)
        for step in range(3):
            update(engine, step)
        middle = state(engine, parameters)
        bad = update(engine, 99, factor=float("nan"))
        generator = torch.Generator().manual_seed(dist.get_rank())
        engine.backward(engine(torch.randn(2, 6, generator=generator)).sum(), scale_wrt_gas=False)
        discard_gradients(engine, parameters)  # of a step that is given up half-way
        untouched = same(middle, state(engine, parameters))
        for step in (3, 4):
            update(engine, step, backwards=step)
        end = state(engine, parameters)

        resumed, parameters = make(stage, middle)
        restore_moments(resumed, parameters, middle, updates=3)
        restored = same(middle, state(resumed, parameters))
        for step in (3, 4):
            update(resumed, step, backwards=step)
        found[stage] = {
            "bad_step_applied": bad,
            "bad_step_left_everything": untouched,
            "restored": restored,
            "resumed_equals_undisturbed": same(end, state(resumed, parameters)),
            "largest_difference_to_one_process": max((middle[n] - reference[n]).abs().max().item() for n in NAMES),
        }
        for name, options in NORMS.items():
            engine, parameters = make(stage, **options)
            norms = []
            for step in range(2):
                update(engine, step, factor=100.0)  # far above 1, where DeepSpeed would clip if it were left to
                norms.append(float(engine.get_global_grad_norm()))
            found[stage][name] = {"norms": norms, "weights": flat(gather_parameters(engine, parameters))}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
