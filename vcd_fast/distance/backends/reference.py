"""The sliced Wasserstein distance in plain PyTorch: any dtype and device, differentiated by autograd. The oracle of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from vcd_fast.distance.lists import Lists, projected_lists
from vcd_fast.distance.target import SortedTarget


def every_value(lists: Lists) -> Tensor:
    """The full list [B, K, n], unsorted."""
    values, alone, form = lists
    if form == "whole":
        return values
    return torch.cat([values, values if form == "even" else -values, alone], -1)


def every_value_sorted(part: Lists) -> Tensor:
    """The full ascending list [B, K, n] of a target's part: a merge of two sorted lists, without sorting."""
    if part.form == "whole":
        return part.representatives
    pairs, alone = part.representatives, part.self_conjugate.contiguous()
    pairs = torch.cat([-pairs.flip(-1), pairs], -1) if part.form == "odd" else pairs.repeat_interleave(2, -1)
    size = pairs.shape[-1] + alone.shape[-1]
    # A pair stands behind the single values below it, a single one behind the pairs up to and including it: a permutation, ties or
    # not. NaN breaks that, and leaves a NaN in place of what it displaced.
    full = pairs.new_full((*pairs.shape[:-1], size), torch.nan)
    at = torch.searchsorted(alone, pairs) + torch.arange(pairs.shape[-1], device=pairs.device)
    full.scatter_(-1, at, pairs)
    at = torch.searchsorted(pairs, alone, right=True) + torch.arange(alone.shape[-1], device=pairs.device)
    return full.scatter_(-1, at, alone)


def sliced_terms(x: Tensor, target: SortedTarget) -> Tensor:
    """W_p^p of every sample and part, with autograd's graph.

    Args:
        x: [N, C, H, W] of the target's dtype and device. target: batch size B, N a multiple of B; sample i is compared with the
            target's sample i // (N/B).

    Returns:
        [N, parts]: mean over directions and ranks of |x_(j) - y_(j)|^p.
    """
    config = target.config
    terms = []
    for lists, part in zip(projected_lists(x, config, target.projections), target.parts, strict=True):
        ordered = every_value(lists).sort(-1).values.unflatten(0, (target.batch_size, -1))
        cost = ordered - every_value_sorted(part).unsqueeze(1)
        cost = cost.abs() if config.p == 1 else cost.square()
        terms.append(cost.mean((-1, -2)).flatten())
    return torch.stack(terms, -1)
