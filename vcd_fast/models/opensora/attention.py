"""Attention of Open-Sora's transformer: one function, two interchangeable backends.

`sdpa` is PyTorch's `scaled_dot_product_attention`, everywhere. `xformers` is `memory_efficient_attention`, on GPUs it supports; texts
of different length are then packed end to end under a block-diagonal mask instead of padded.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("sdpa", "xformers")
GPU = "cuda"


class Text(NamedTuple):
    """Text tokens of a batch, as cross-attention reads them."""

    tokens: Tensor
    """[B, L, C]; with `lengths`, [1, sum(lengths), C]"""
    mask: Tensor | None = None
    """[B, L] bool, True where a token counts; None when all do"""
    lengths: tuple[int, ...] | None = None
    """tokens per sample of packed text (xformers)"""


def resolve_backend(name: str) -> str:
    """The backend of that name; `native` is what diffusers calls `sdpa`.

    Raises:
        ValueError: unknown name.
        ImportError: `xformers` is asked for and cannot be imported.
    """
    name = "sdpa" if name == "native" else name
    if name not in BACKENDS:
        raise ValueError(f"attention_backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "xformers":
        _xformers()
    return name


def _xformers() -> ModuleType:
    try:
        return importlib.import_module("xformers.ops")
    except Exception as error:  # a build for another torch fails with whatever its extension module raises
        raise ImportError(
            f"attention_backend 'xformers' cannot be imported ({type(error).__name__}: {error}); install the xformers build "
            "that matches this torch, or use 'sdpa'"
        ) from error


def pack_text(tokens: Tensor, mask: Tensor | None, backend: str) -> Text:
    """Text [B, L, C] and its mask [B, L] in the form `backend` wants.

    For `xformers` the lengths are read on the host: one synchronisation per forward, none per block.
    """
    if backend == "sdpa":
        return Text(tokens, mask)
    batch, length, _ = tokens.shape
    if mask is None:
        return Text(tokens.reshape(1, batch * length, -1), lengths=(length,) * batch)
    return Text(tokens[mask].unsqueeze(0), lengths=tuple(mask.sum(1).tolist()))


def attention(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """Softmax attention without a mask: [N, Lq, heads, d] x [N, Lk, heads, d] -> [N, Lq, heads, d]."""
    if backend == "xformers":
        return _memory_efficient(query, key, value, None)
    return _sdpa(query, key, value, None)


def cross_attention(query: Tensor, key: Tensor, value: Tensor, text: Text, backend: str) -> Tensor:
    """Attention of every sample to its own text: query [B, N, heads, d], key and value laid out as `text.tokens`."""
    if backend == "sdpa":
        mask = None if text.mask is None else text.mask[:, None, None, :]
        return _sdpa(query, key, value, mask)
    batch, length = query.shape[:2]
    bias = _xformers().fmha.attn_bias.BlockDiagonalMask.from_seqlens([length] * batch, list(text.lengths))
    packed = query.reshape(1, batch * length, *query.shape[2:])
    return _memory_efficient(packed, key, value, bias).view_as(query)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor, bias: object) -> Tensor:
    if query.device.type != GPU:
        raise ValueError(
            f"attention_backend 'xformers': expected tensors on a GPU, got {query.device}; use 'sdpa' here"
        )
    if torch.is_autocast_enabled(GPU):  # xformers is not on autocast's list, the projections before it are
        query, key, value = (tensor.to(torch.get_autocast_dtype(GPU)) for tensor in (query, key, value))
    return _xformers().memory_efficient_attention(query, key, value, attn_bias=bias)
