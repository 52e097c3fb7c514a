"""Prompts as Open-Sora 1.2 was trained on them: scores appended, cleaned, embedded by T5."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 300
"""Length of the null caption; longer prompts are cut."""


def append_scores(
    prompt: str,
    aesthetic_score: float | None = 6.5,
    motion_score: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """`prompt aesthetic score: 6.5. motion score: 5.0. camera motion: pan left.`, each part unless it is None or there already."""
    parts = (
        ("aesthetic score:", None if aesthetic_score is None else f"{aesthetic_score:.1f}"),
        ("motion score:", None if motion_score is None else f"{motion_score:.1f}"),
        ("camera motion:", camera_motion),
    )
    for label, value in parts:
        if value is not None and label not in prompt:
            prompt = f"{prompt} {label} {value}."
    return prompt


def clean_caption(prompt: str) -> str:
    """Lower case, without addresses, markup, names, file names, odd punctuation; applied twice, as in training.

    Raises:
        ImportError: ftfy or beautifulsoup4 is missing.
    """
    clean = _cleaner()
    return clean(clean(prompt))


@functools.cache
def _cleaner() -> Callable[[str], str]:
    try:
        import bs4  # noqa: F401  (diffusers uses both and imports neither if one is missing)
        import ftfy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"prompts are cleaned with ftfy and beautifulsoup4: {error}; pip install ftfy beautifulsoup4"
        ) from error
    from diffusers import PixArtSigmaPipeline

    # Only a method that reads a class attribute is wanted, and no pipeline made.
    return PixArtSigmaPipeline.__new__(PixArtSigmaPipeline)._clean_caption


def prepare_prompts(prompts: Sequence[str], scores: Callable[[str], str] = append_scores) -> list[str]:
    """Prompts as T5 reads them.

    Raises:
        ValueError: a prompt that is empty, or of which cleaning leaves nothing; the message says which.
    """
    prepared = []
    for index, prompt in enumerate(prompts):
        if not clean_caption(prompt):
            left = "" if not prompt.strip() else ", of which cleaning leaves nothing"
            raise ValueError(f"prompts[{index}]: expected a description of the video, got {prompt!r}{left}")
        prepared.append(clean_caption(scores(prompt)))
    return prepared


@torch.no_grad()
def embed(prompts: Sequence[str], tokenizer: Any, text_encoder: nn.Module) -> list[Tensor]:
    """[tokens, D] of every prompt on the CPU, end token included, no padding.

    Each prompt goes alone: padding changes nothing but rounding, and so an embedding does not depend on its batch.
    """
    device = next(text_encoder.parameters()).device
    embedded: dict[str, Tensor] = {}
    for prompt in dict.fromkeys(prompts):
        tokens = tokenizer(prompt, truncation=True, max_length=MAX_TOKENS, add_special_tokens=True, return_tensors="pt")
        embedded[prompt] = text_encoder(tokens.input_ids.to(device)).last_hidden_state[0].cpu()
    return [embedded[prompt] for prompt in prompts]
