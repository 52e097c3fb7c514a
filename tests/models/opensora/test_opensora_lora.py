"""LoRAs of Open-Sora as PEFT and VADER store them: every way round, the output stays."""

from __future__ import annotations

import dataclasses
import os
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from vcd_fast.models.lora import (
    LoRASettings,
    LoRAWeights,
    add_lora,
    export_lora,
    load_lora,
    lora_parameters,
    lora_weights,
    save_lora,
)
from vcd_fast.models.lora_files import read_lora, write_lora
from vcd_fast.models.opensora import LORA_TARGETS, ModelSettings, load_model
from vcd_fast.models.opensora.adapter import OpenSoraI2V
from vcd_fast.models.opensora.lora_keys import from_vader, load_vader, save_vader, to_vader
from vcd_fast.models.opensora.tiny import tiny_transformer
from vcd_fast.models.opensora.transformer import STDiT3


def tiny_model() -> OpenSoraI2V:
    settings = ModelSettings(weights="tiny-random", height=32, width=48, num_frames=17, dtype="float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.weights=tiny-random", category=UserWarning)
        return load_model(settings)


def tuned(alpha: float = 8, rank: int = 4) -> OpenSoraI2V:
    model = tiny_model()
    parameters = add_lora(model, LoRASettings(rank=rank, alpha=alpha), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


@torch.no_grad()
def output(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(1, 4, 2, 4, 6, generator=generator),
        timestep=torch.tensor([300.0]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        height=32,
        width=48,
        fps=24,
        return_dict=False,
    )[0]


def test_keys_of_the_full_size(golden):
    """Rank 16 on the default layers of XL/2 is exactly what VADER saves."""
    expected = golden("vader_lora_xl2_keys").meta
    with torch.device("meta"):
        model = STDiT3()
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=expected["rank"], lora_alpha=8, target_modules=LORA_TARGETS["default"]))
    tensors = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    modules = {name.split(".lora_")[0] for name in tensors}
    state = to_vader(LoRAWeights(tensors, dict.fromkeys(modules, 8.0), "opensora"))
    assert {key: list(value.shape) for key, value in state.items()} == expected["shapes"]
    assert len(state) == expected["n_keys"]
    assert sum(value.numel() for value in state.values()) == expected["n_params"]


@pytest.mark.parametrize(("name", "layers"), [("default", 12), ("attention", 20), ("all", 28)])
def test_named_targets(name, layers):
    model = tiny_model()
    parameters = add_lora(model, LoRASettings(rank=2, targets=name), seed=0)
    assert len(parameters) == 2 * layers


@pytest.mark.parametrize("alpha", [8, 2])
def test_what_vader_loads_has_the_same_effect(alpha, tmp_path):
    """VADER's own steps: PEFT with its default alpha, then the state dict from torch.load."""
    model = tuned(alpha)
    path = save_vader(tmp_path / "lora.pt", lora_weights(model))
    theirs = get_peft_model(tiny_transformer(), LoraConfig(r=4, target_modules=LORA_TARGETS["default"]))
    result = set_peft_model_state_dict(theirs, torch.load(path, weights_only=True))
    assert not result.unexpected_keys
    expected = output(model.transformer)
    torch.testing.assert_close(output(theirs), expected, rtol=1e-5, atol=1e-6)
    assert (output(tiny_transformer()) - expected).abs().max() > 1e-3, "the LoRA has an effect"


@pytest.mark.parametrize("alpha", [8, 2])
def test_from_vader_and_back(alpha, tmp_path):
    model = tuned(alpha)
    save_vader(tmp_path / "lora.pt", lora_weights(model))
    weights = load_vader(tmp_path / "lora.pt")
    write_lora(tmp_path / "diffusers", weights)
    again = tiny_model()
    load_lora(again, tmp_path / "diffusers")
    tolerance = {"rtol": 0, "atol": 0} if alpha == 8 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(output(again.transformer), output(model.transformer), **tolerance)
    state = to_vader(weights)
    assert all(
        torch.equal(state[key], value) for key, value in torch.load(tmp_path / "lora.pt", weights_only=True).items()
    )


@pytest.mark.parametrize("name", ["folder", "file.pt"])
def test_export_to_vader(name, tmp_path):
    model = tuned()
    save_lora(model, tmp_path / "run")
    path = export_lora(tmp_path / "run", tmp_path / name, "vader")
    assert path == (tmp_path / name if name == "file.pt" else tmp_path / name / "lora_vader.pt")
    weights = load_vader(path)
    assert all(torch.equal(weights.tensors[k], v) for k, v in lora_weights(model).tensors.items())


def test_peft_loads_what_is_exported(tmp_path):
    model = tuned(alpha=3)
    save_lora(model, tmp_path / "diffusers")
    write_lora(tmp_path / "peft", read_lora(tmp_path / "diffusers"), "peft")
    theirs = PeftModel.from_pretrained(tiny_transformer(), str(tmp_path / "peft"))
    assert torch.equal(output(theirs), output(model.transformer))
    again = tiny_model()
    load_lora(again, tmp_path / "peft")
    assert torch.equal(output(again.transformer), output(model.transformer))


def test_diffusers_own_methods_load_what_is_saved(tmp_path):
    model = tuned(alpha=3)
    file = save_lora(model, tmp_path)
    theirs = tiny_transformer()
    theirs.load_lora_adapter(str(file.parent), weight_name=file.name)
    assert torch.equal(output(theirs), output(model.transformer))


def test_lora_of_another_family():
    weights = lora_weights(tuned())
    with pytest.raises(ValueError, match="lora: expected one for opensora, got one for wan"):
        to_vader(dataclasses.replace(weights, family="wan"))


def test_state_dicts_that_are_not_vaders():
    state = to_vader(lora_weights(tuned()))
    key = next(iter(state))
    with pytest.raises(ValueError, match=r"lora: expected keys base_model\.model\..*, got other\.weight"):
        from_vader({**state, "other.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="got none"):
        from_vader({})
    with pytest.raises(
        ValueError, match=r"expected a pair of matrices of one rank for .*attn.qkv, got \[None, \[192, 4\]\]"
    ):
        from_vader({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="expected a pair of matrices of one rank"):
        from_vader({**state, key: state[key][:2]})


def test_files_that_are_not_vaders(tmp_path):
    path = save_vader(tmp_path / "lora.pt", lora_weights(tuned()))
    os.truncate(path, 3000)
    with pytest.raises(ValueError, match=r"lora.pt: expected a state dict written by torch.save"):
        load_vader(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a dictionary of tensors, got list"):
        load_vader(path)
    with pytest.raises(FileNotFoundError):
        load_vader(tmp_path / "nowhere.pt")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_vader(tmp_path / "lora.pt", lora_weights(tuned()))
    assert list(tmp_path.iterdir()) == []


def test_parameters_are_float32_on_a_model_of_half_precision():
    settings = ModelSettings(weights="tiny-random", height=32, width=48, num_frames=17, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.weights=tiny-random", category=UserWarning)
        model = load_model(settings)
    parameters = add_lora(model, LoRASettings(rank=2, alpha=1), seed=0)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {p.dtype for n, p in model.transformer.named_parameters() if "lora" not in n} == {torch.bfloat16}
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.transformer.train(False)
    with torch.enable_grad():
        out = model.transformer(
            hidden_states=torch.randn(1, 4, 2, 4, 6),
            timestep=torch.tensor([300.0]),
            encoder_hidden_states=torch.randn(1, 5, 32),
            height=32,
            width=48,
            fps=24,
            return_dict=False,
        )[0]
        out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
