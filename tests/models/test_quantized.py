"""Quantized frozen weights: what is replaced, that LoRA gradients are those of the rounded model, and what is said where it cannot be had."""

import sys
import types
import warnings

import pytest
import torch
from torch import nn

from vcd_fast.models.base import family
from vcd_fast.models.lora import LoRASettings, add_lora
from vcd_fast.models.quantized import quantize_linears

SIZE = {"wan": {"height": 32, "width": 32, "num_frames": 5}, "opensora": {"height": 32, "width": 32, "num_frames": 17}}


def load(name, quantization="none"):
    module = family(name)
    settings = module.ModelSettings(weights="tiny-random", dtype="float32", quantization=quantization, **SIZE[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.weights=tiny-random")
        return module.load_model(settings)


class TestRefusal:
    def test_without_bitsandbytes(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(
            ImportError, match=r"model\.quantization: nf4 needs bitsandbytes .*pip install bitsandbytes"
        ):
            load("wan", "nf4")

    @pytest.mark.parametrize("kind", ["int8", "nf4"])
    def test_with_one_that_does_not_run_here(self, monkeypatch, kind):
        def cannot(*arguments, **options):
            raise RuntimeError("no kernels")

        stand_in = types.ModuleType("bitsandbytes")
        stand_in.__version__ = "0.0"
        stand_in.nn = types.SimpleNamespace(Linear4bit=cannot, Linear8bitLt=cannot)
        monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
        with pytest.raises(ImportError, match=rf"bitsandbytes 0\.0 cannot compute {kind} on cpu here \(no kernels\)"):
            quantize_linears([nn.Sequential(nn.Linear(2, 2))], kind, torch.float32, "cpu")

    def test_none_needs_nothing_and_changes_nothing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        block = nn.Sequential(nn.Linear(2, 2))
        assert quantize_linears([block], "none", torch.float32, "cpu") == 0
        assert type(block[0]) is nn.Linear


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="optional; pip install bitsandbytes")


@pytest.mark.parametrize("name", ["wan", "opensora"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_linear_layers_of_blocks_are_replaced_and_nothing_else(bitsandbytes, name, kind):
    plain, rounded = load(name), load(name, kind)
    expected = {"int8": bitsandbytes.nn.Linear8bitLt, "nf4": bitsandbytes.nn.Linear4bit}[kind]
    before, after = dict(plain.transformer.named_modules()), dict(rounded.transformer.named_modules())
    assert before.keys() == after.keys()
    for path, module in before.items():
        within = "blocks" in path.split(".")[0] and type(module) is nn.Linear
        assert type(after[path]) is (expected if within else type(module)), path
    layers = [(before[path].weight, after[path].weight) for path in before if type(after[path]) is expected]
    ratio = sum(old.nbytes for old, _ in layers) / sum(new.nbytes for _, new in layers)
    assert ratio == {"int8": 4, "nf4": 8}[kind]  # of float32


def lora_gradients(model, seed=0):
    parameters = add_lora(model, LoRASettings(rank=2, alpha=2), seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    block = model.transformer.blocks[0].attn1
    x = torch.randn(1, 7, block.to_q.in_features, generator=generator)
    (block.to_out[0](block.to_v(torch.tanh(block.to_q(x)))) ** 2).sum().backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def test_gradients_of_nf4_are_those_of_the_rounded_weights(bitsandbytes):
    rounded, reference = load("wan", "nf4"), load("wan")
    for path, module in rounded.transformer.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = reference.transformer.get_submodule(path)
            assert 0 < (values - linear.weight).abs().max() < 0.5 * linear.weight.abs().max()
            linear.weight.data.copy_(values)
    expected, found = lora_gradients(reference), lora_gradients(rounded)
    assert len(expected) == 6
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_gradients_of_int8_are_close_to_those_of_the_weights(bitsandbytes):
    expected, found = lora_gradients(load("wan")), lora_gradients(load("wan", "int8"))
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.1 * value.norm(), name
