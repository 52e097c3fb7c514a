"""Prompts against what the original made of them."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from vcd_fast.models.opensora import tiny
from vcd_fast.models.opensora.text import MAX_TOKENS, _cleaner, append_scores, clean_caption, embed, prepare_prompts


@pytest.fixture(scope="module")
def cases(golden):
    return golden("text").meta


def test_cleaning(cases):
    assert len(cases["clean"]) > 30
    for case in cases["clean"]:
        assert clean_caption(case["in"]) == case["text_preprocessing"], case["in"]


def test_scores(cases):
    full = partial(append_scores, aesthetic_score=7.0, motion_score=5.0, camera_motion="pan left")
    for case in cases["append_score"]:
        assert append_scores(case["in"]) == case["out"]
        assert full(case["in"]) == case["out_full"]
    assert append_scores("a cat", None) == "a cat"


def test_what_t5_reads(cases):
    for case in cases["pipeline"]:
        if clean_caption(case["in"]):  # an empty prompt is an error here
            assert prepare_prompts([case["in"]]) == [case["out"]]


@pytest.mark.parametrize("prompt", ["", "  ", "free shipping worldwide free shipping"])
def test_prompts_that_say_nothing(prompt):
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected a description of the video"):
        prepare_prompts(["a cat", prompt])


def test_missing_dependency(monkeypatch):
    monkeypatch.setitem(sys.modules, "bs4", None)
    _cleaner.cache_clear()
    with pytest.raises(ImportError, match="pip install ftfy beautifulsoup4"):
        clean_caption("a cat")


def test_embeddings_equal_those_of_a_padded_batch():
    tokenizer, encoder = tiny.tiny_tokenizer(), tiny.tiny_text_encoder()
    prompts = ["a cat on a mat", "a very much longer prompt about two dogs", "a cat on a mat"]
    alone = embed(prompts, tokenizer, encoder)
    padded = tokenizer(prompts, padding="max_length", max_length=60, return_tensors="pt")
    with torch.no_grad():
        together = encoder(padded.input_ids, padded.attention_mask).last_hidden_state
    for one, row, mask in zip(alone, together, padded.attention_mask.bool(), strict=True):
        torch.testing.assert_close(one, row[mask], rtol=1e-4, atol=1e-5)


def test_long_prompts_are_cut():
    (embedded,) = embed(["word " * 200], tiny.tiny_tokenizer(), tiny.tiny_text_encoder())
    assert embedded.shape == (MAX_TOKENS, tiny.TEXT_DIM)
