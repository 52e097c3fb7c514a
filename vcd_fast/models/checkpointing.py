"""Which blocks of a diffusers transformer are recomputed in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def block_checkpointing(transformer: nn.Module, enabled: bool) -> Iterator[None]:
    """`I2VModel.block_checkpointing` for transformers that follow diffusers' convention; what was set before comes back.

    Random numbers are not kept for the recomputation: nothing in these blocks draws any.
    """
    before = transformer.gradient_checkpointing, getattr(transformer, "_gradient_checkpointing_func", None)
    transformer.gradient_checkpointing = enabled
    transformer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        transformer.gradient_checkpointing, transformer._gradient_checkpointing_func = before
