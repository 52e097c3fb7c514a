"""Which blocks of a diffusers transformer are recomputed in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


@contextmanager
def block_checkpointing(transformer: nn.Module, enabled: bool) -> Iterator[None]:
    """`I2VModel.block_checkpointing` for transformers that follow diffusers' convention; what was set before comes back.

    Random numbers are not kept for the recomputation: nothing in these blocks draws any.
    """
    before = transformer.gradient_checkpointing, getattr(transformer, "_gradient_checkpointing_func", None)
    transformer.gradient_checkpointing = enabled
    transformer._gradient_checkpointing_func = _recomputed
    try:
        yield
    finally:
        transformer.gradient_checkpointing, transformer._gradient_checkpointing_func = before


def _recomputed(block: nn.Module, *arguments: Any) -> Any:
    """Tensors in tuples (rotary embeddings) are handed over one by one: only then does the checkpoint save them as it does the others, so
    that a checkpoint around it lets go of them."""
    leaves, structure = tree_flatten(arguments)

    def run(*leaves: Any) -> Any:
        return block(*tree_unflatten(leaves, structure))

    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)
