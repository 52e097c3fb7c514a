"""The words the model knows, its tokenizer, and attention to a prompt that costs what its words cost.

Wan attends to 512 text tokens, all but the prompt's own being zeros before they are embedded. Those are equal to each other, so attention
to `LENGTH` tokens of which the last one, a padding one, counts `512 - LENGTH + 1` times is the same (log of that added to its score).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.tiny_i2v.clips import MOTIONS
from vcd_fast.models.wan.condition import TEXT_TOKENS

LENGTH = 24
"""tokens of a prompt in training, `</s>` and at least one of padding included"""
SPECIAL = ("<pad>", "</s>", "<unk>")
OTHER = """
    astronaut space suit smiles turns her head cat looks up red cup coffee table galaxies stars man tripod raccoon leaves rocket launch pad rises
    and while with an on in of by to it photo photograph video view street house sea sky tree water black white green blue small large
""".split()  # noqa: SIM905


def words() -> list[str]:
    """Every word of the motions' phrases and some others, in a fixed order. What else a prompt says becomes `<unk>`."""
    phrases = " ".join(phrase for motion in MOTIONS.values() for phrase in motion.prompts)
    return list(dict.fromkeys([*phrases.split(), *OTHER]))


def new_tokenizer() -> object:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def new_text_encoder() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(words()) + len(SPECIAL),
            d_model=48,
            d_kv=12,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            dropout_rate=0.0,
        )
    )


def encode_prompts(encoder: nn.Module, tokenizer: object, prompts: list[str], length: int = LENGTH) -> Tensor:
    """[B, length, 48], zeros after each prompt's `</s>`.

    Raises:
        ValueError: a prompt of more tokens than leave one of padding.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=False, return_tensors="pt")
    if tokens.input_ids.shape[1] > length or bool(tokens.attention_mask[:, -1].any()):
        raise ValueError(f"prompts: expected fewer than {length} tokens each, got {max(prompts, key=len)!r}")
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


class ShortTextAttention:
    """Processor of Wan's cross attention for text states of `length` tokens, the last of them padding; see the module's docstring."""

    def __init__(self, length: int = LENGTH) -> None:
        self.bias = torch.zeros(length)
        self.bias[-1] = math.log(TEXT_TOKENS - length + 1)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *unused: object, **also: object
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias[None].to(query))
        return attn.to_out[1](attn.to_out[0](found.transpose(1, 2).flatten(2)))


def attend_to_short_text(transformer: nn.Module, length: int = LENGTH) -> nn.Module:
    """Give every block's cross attention the processor; the module keeps its weights and stays what it was otherwise."""
    for block in transformer.blocks:
        block.attn2.set_processor(ShortTextAttention(length))
    return transformer
