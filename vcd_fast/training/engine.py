"""DeepSpeed as this project uses it: one engine around the transformer, only the LoRA is optimised.

- Gradient accumulation is unmanaged (`managed_gradient_accumulation: false`): every `backward` adds, `step` is the boundary. The
  number of backward passes per step depends on the plan (`spaced:K` makes K of them), which a fixed count cannot express.
- A client `torch.optim.AdamW` is passed in, so nothing is compiled; the shared-memory communicator, which would be, is switched off.
- A gradient that is not finite never reaches the weights: ZeRO 1-3 discard the step by themselves, stage 0 by `GuardedAdamW`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable

import torch

# Both are read when deepspeed is imported: without them it guesses the device, and says so.
os.environ.setdefault("DS_LOG_LEVEL", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn

from vcd_fast.devices import free_port
from vcd_fast.training.settings import TrainingSettings


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and leaves everything untouched when that norm is not finite.

    DeepSpeed reads `overflow` and `_global_grad_norm` from whatever optimizer it is given; its ZeRO optimizers set them, and
    without ZeRO this class does.
    """

    def __init__(self, parameters: Iterable[Tensor], max_grad_norm: float, **options):
        super().__init__(parameters, **options)
        self.max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm: float | None = None

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return None
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return super().step(closure)


def init_distributed(device: torch.device) -> None:
    """Join the process group of the launcher, or form one of a single process where there is no launcher."""
    if dist.is_initialized():
        return
    if device.type == "cpu":
        # Shared memory between ranks of one CPU machine would be compiled on first use (40 s and a compiler); gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        if local > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each take all cores wait for one another most of the time.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)


def build(
    transformer: nn.Module, parameters: list[nn.Parameter], settings: TrainingSettings, dtype: torch.dtype
) -> deepspeed.DeepSpeedEngine:
    """Wrap the transformer (adapter already added).

    Args:
        transformer: frozen but for `parameters`.
        parameters: float32, the LoRA.
        dtype: of the frozen weights. Below float32 the engine's autocast section is used, which keeps the LoRA in float32; its
            bf16 section would cast the LoRA and the modules that have to stay float32.
    """
    options = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    # DeepSpeed allocates its buckets whole, by default for 5e8 elements (2 GB) of which a LoRA fills a few percent.
    bucket = max(1 << 16, sum(parameter.numel() for parameter in parameters))
    config = {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "managed_gradient_accumulation": False,
        "zero_optimization": {
            "stage": settings.zero,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": None,
    }
    if settings.zero == 0:
        optimizer = GuardedAdamW(parameters, settings.max_grad_norm, **options)
        config["gradient_clipping"] = 0.0  # the optimizer clips; left out, DeepSpeed would clip at 1 before it
    else:
        optimizer = torch.optim.AdamW(parameters, **options)
        config["gradient_clipping"] = settings.max_grad_norm
        config["zero_allow_untested_optimizer"] = True
    if settings.zero == 3:
        # Every tensor is sharded: the defaults keep small ones whole, which on a small model is all of them.
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    if dtype != torch.float32:
        _keep_out_of_autocast(transformer)
        # No module's gradients are sent in the lower precision: they are the LoRA's, and those are float32.
        name = str(dtype).removeprefix("torch.")
        config["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    engine, _, _, _ = deepspeed.initialize(
        model=transformer, model_parameters=parameters, optimizer=optimizer, config=config
    )
    return engine


def _keep_out_of_autocast(transformer: nn.Module) -> None:
    """Let what the model's class keeps in float32 also compute in it, as it does where videos are generated without autocast."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in kept:
            module.forward = _without_autocast(module.forward)


def _without_autocast(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def in_float32(*inputs: Tensor, **options: object) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return forward(*inputs, **options)

    return in_float32


def all_agree(flag: bool, device: torch.device) -> bool:
    """True if `flag` is true on every rank."""
    vote = torch.tensor(int(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote.item())


def mean_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The mean of a small float tensor over all ranks, on the CPU in float64."""
    total = values.detach().to(device, torch.float64).clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).cpu()
