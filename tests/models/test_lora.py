"""LoRA on the tiny Wan model: what is trained, what is written, and that other tools read it as we do."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vcd_fast.models.lora import (
    LoRASettings,
    add_lora,
    export_lora,
    load_lora,
    lora_disabled,
    lora_parameters,
    lora_state_dict,
    save_lora,
    set_lora_scale,
)
from vcd_fast.models.lora_files import LoRAWeights, read_lora, write_lora
from vcd_fast.models.wan.targets import LORA_TARGETS
from vcd_fast.models.wan.tiny import tiny_transformer

EVERYTHING = "attention+image+ffn"


class Holder:
    """As much of an I2VModel as a LoRA needs."""

    family = "wan"
    lora_targets = LORA_TARGETS

    def __init__(self, transformer):
        self.transformer = transformer


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return tiny_transformer()


@pytest.fixture
def model(base):
    return Holder(copy.deepcopy(base))


def shaken(model, **settings):
    """With a LoRA whose B is not zero."""
    add_lora(model, LoRASettings(**{"rank": 4, "alpha": 10, "targets": EVERYTHING, **settings}), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def output(transformer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return transformer(
        hidden_states=torch.randn(1, 36, 2, 4, 4, generator=generator).to(dtype),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 512, 32, generator=generator).to(dtype),
        encoder_hidden_states_image=torch.randn(1, 17, 16, generator=generator).to(dtype),
        return_dict=False,
    )[0]


# --- on the model


def test_a_fresh_lora_changes_nothing_and_only_it_is_trained(model, base):
    parameters = add_lora(model, LoRASettings(rank=4, alpha=10), seed=1)
    assert torch.equal(output(model.transformer), output(base))
    trained = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == {id(p) for p in parameters.values()}
    assert len(parameters) == 2 * 8 * 2  # blocks, layers, matrices
    assert list(parameters) == sorted(parameters)
    assert parameters["blocks.0.attn1.to_q.lora_A.weight"].shape == (4, 24)
    assert all((p == 0).all() == name.endswith("lora_B.weight") for name, p in parameters.items())


def test_base_in_bfloat16_lora_in_float32(base):
    model = Holder(copy.deepcopy(base).to(torch.bfloat16))
    parameters = add_lora(model, LoRASettings(rank=4), seed=1)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert model.transformer.patch_embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_start_is_a_function_of_the_seed(base, init):
    def start(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        parameters = add_lora(Holder(copy.deepcopy(base)), LoRASettings(rank=8, init=init), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return parameters

    first, again, other = start(5, 0), start(5, 1), start(6, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    a_names = [name for name in first if name.endswith("lora_A.weight")]
    assert not any(torch.equal(first[name], other[name]) for name in a_names)
    assert len({first[name].sum().item() for name in a_names}) == len(a_names)
    std = torch.cat([first[name].flatten() for name in a_names if "ffn" not in name]).std().item()
    # PEFT's kaiming start is uniform in ±1/sqrt(fan in); gaussian has standard deviation 1/rank
    assert std == pytest.approx((1 / 8) if init == "gaussian" else (1 / 24 / 3) ** 0.5, rel=0.05)


def test_start_of_peft_has_the_same_distribution(base):
    from peft import LoraConfig

    torch.manual_seed(0)
    transformer = copy.deepcopy(base)
    transformer.add_adapter(LoraConfig(r=64, target_modules=["to_q"]))
    theirs = transformer.blocks[0].attn1.to_q.lora_A["default"].weight
    model = Holder(copy.deepcopy(base))
    ours = add_lora(model, LoRASettings(rank=64, targets=["to_q"]), seed=0)["blocks.0.attn1.to_q.lora_A.weight"]
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_targets(model, base):
    with pytest.raises(
        ValueError, match=r"lora.targets: expected a list of module names or one of attention, .* got 'all'"
    ):
        add_lora(model, LoRASettings(targets="all"), seed=0)
    with pytest.raises(ValueError, match=r"no linear layer ends in to_z; there are .*attn1.to_q"):
        add_lora(model, LoRASettings(targets=["to_q", "to_z"]), seed=0)
    with pytest.raises(ValueError, match="no linear layer ends in nothing"):
        add_lora(model, LoRASettings(targets=[]), seed=0)
    assert not hasattr(model.transformer, "peft_config")
    names = add_lora(model, LoRASettings(targets=["attn1.to_q"]), seed=0)
    assert {name.rsplit(".lora_", 1)[0] for name in names} == {"blocks.0.attn1.to_q", "blocks.1.attn1.to_q"}
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(model, LoRASettings(), seed=0)


def test_image_layers_are_refused_where_there_are_none():
    model = Holder(tiny_transformer(image_encoder=False))
    with pytest.raises(ValueError, match="no linear layer ends in add_k_proj, add_v_proj"):
        add_lora(model, LoRASettings(targets="attention+image"), seed=0)


def test_scale_and_disable(model, base):
    shaken(model)
    tuned = output(model.transformer)
    assert not torch.allclose(tuned, output(base))
    set_lora_scale(model, 0)
    assert torch.equal(output(model.transformer), output(base))
    set_lora_scale(model, 0.5)
    half = output(model.transformer)
    assert not torch.equal(half, tuned)
    set_lora_scale(model, 1)
    assert torch.equal(output(model.transformer), tuned)
    frozen = next(iter(lora_parameters(model).values()))
    frozen.requires_grad_(False)
    with lora_disabled(model):
        assert torch.equal(output(model.transformer), output(base))
    assert torch.equal(output(model.transformer), tuned)
    assert [p.requires_grad for p in lora_parameters(model).values()] == [False] + [True] * 47
    with lora_disabled(Holder(base)):
        output(base)


def test_a_plain_module_can_have_a_lora():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))])

        def forward(self, x):
            return self.blocks[0](x)

    model = Holder(Plain())
    model.family = None
    parameters = add_lora(model, LoRASettings(rank=2, alpha=1, targets=["0.1"]), seed=0)
    assert list(parameters) == ["blocks.0.1.lora_A.weight", "blocks.0.1.lora_B.weight"]
    model.transformer(torch.randn(1, 4)).sum().backward()
    assert parameters["blocks.0.1.lora_B.weight"].grad is not None


# --- in files


def test_save_and_load(model, base, tmp_path):
    shaken(model)
    file = save_lora(model, tmp_path / "lora")
    assert file == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert [p.name for p in (tmp_path / "lora").iterdir()] == [file.name]
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    packed = json.loads(metadata["lora_adapter_metadata"])
    assert packed["transformer.r"] == 4
    assert packed["transformer.lora_alpha"] == 10
    assert packed["transformer.target_modules"] == sorted(LORA_TARGETS[EVERYTHING])
    loaded = Holder(copy.deepcopy(base))
    load_lora(loaded, tmp_path / "lora")
    assert torch.equal(output(loaded.transformer), output(model.transformer))
    again = save_lora(loaded, tmp_path / "again.safetensors")
    with safe_open(again, framework="pt") as opened:
        assert opened.metadata() == metadata
    assert load_file(again).keys() == load_file(file).keys()
    assert all(torch.equal(load_file(again)[key], value) for key, value in load_file(file).items())
    half = Holder(copy.deepcopy(base))
    load_lora(half, file, scale=0.5)
    set_lora_scale(model, 0.5)
    assert torch.equal(output(half.transformer), output(model.transformer))


def test_values_gathered_elsewhere_can_be_saved(model, tmp_path):
    shaken(model)
    state = {name: value + 1 for name, value in lora_state_dict(model).items()}
    read = read_lora(save_lora(model, tmp_path, state))
    assert read.tensors.keys() == state.keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in state.items())


def test_loading_into_the_lora_that_is_there(model, base, tmp_path):
    save_lora(shaken(model), tmp_path)
    same = Holder(copy.deepcopy(base))
    add_lora(same, LoRASettings(rank=4, alpha=10, targets=EVERYTHING), seed=9)
    load_lora(same, tmp_path)
    assert torch.equal(output(same.transformer), output(model.transformer))
    for settings, found in (
        (LoRASettings(rank=8, alpha=10, targets=EVERYTHING), r"\(4, 10.0\) in the file and \(8, 10.0\) on the model"),
        (LoRASettings(rank=4, alpha=4, targets=EVERYTHING), r"\(4, 10.0\) in the file and \(4, 4.0\) on the model"),
        (LoRASettings(rank=4, alpha=10), r"\(4, 10.0\) in the file and None on the model"),
    ):
        other = Holder(copy.deepcopy(base))
        add_lora(other, settings, seed=0)
        with pytest.raises(ValueError, match=found):
            load_lora(other, tmp_path)


def test_a_lora_for_another_model_is_refused(model, tmp_path):
    save_lora(shaken(model), tmp_path)
    with pytest.raises(ValueError, match=r"is for another model; there is no linear layer blocks.0.attn2.add_k_proj"):
        load_lora(Holder(tiny_transformer(image_encoder=False)), tmp_path)
    weights = read_lora(tmp_path)
    name = "blocks.0.attn1.to_q.lora_A.weight"
    wider = dataclasses.replace(weights, tensors={**weights.tensors, name: torch.zeros(4, 30)})
    other = Holder(tiny_transformer())
    with pytest.raises(ValueError, match=r"its blocks.0.attn1.to_q is 24 x 30, the model's 24 x 24"):
        load_lora(other, write_lora(tmp_path / "wider", wider))
    assert not hasattr(other.transformer, "peft_config")
    wrong = dataclasses.replace(weights, tensors={**weights.tensors, name: torch.zeros(3, 24)})
    with pytest.raises(ValueError, match=r"expected A \[rank, in\] and B \[out, rank\] of blocks.0.attn1.to_q, got"):
        read_lora(write_lora(tmp_path / "wrong", wrong))
    with pytest.raises(ValueError, match="this LoRA is for wan, not for opensora"):
        read_lora(tmp_path, "opensora")


@pytest.mark.parametrize("alpha", [4.0, 10.0, 0.5])
def test_the_stock_pipeline_loads_it_bit_for_bit(base, alpha, tmp_path):
    from diffusers import WanImageToVideoPipeline

    model = shaken(Holder(copy.deepcopy(base)), alpha=alpha)
    save_lora(model, tmp_path)
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=copy.deepcopy(base)
    )
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(pipe.transformer), output(model.transformer))
    assert not torch.equal(output(pipe.transformer), output(base))


def test_the_stock_pipeline_in_bfloat16_differs_by_the_rounding_of_the_lora_alone(base, tmp_path):
    """It casts a LoRA to the dtype of its base; here it stays float32. Rounded here too, the outputs are the same."""
    from diffusers import WanImageToVideoPipeline

    model = shaken(Holder(copy.deepcopy(base).to(torch.bfloat16)))
    save_lora(model, tmp_path)
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=copy.deepcopy(base).to(torch.bfloat16)
    )
    pipe.load_lora_weights(tmp_path)
    exact = output(model.transformer, torch.bfloat16)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.bfloat16()
    rounded = output(model.transformer, torch.bfloat16)
    assert torch.equal(output(pipe.transformer, torch.bfloat16), rounded)
    assert torch.allclose(exact.float(), rounded.float(), atol=0.05)


def test_default_targets_load_into_the_stock_image_model(base, tmp_path):
    """The stock loader adds zeros for the image layers, which these files do not name."""
    from diffusers import WanImageToVideoPipeline

    model = shaken(Holder(copy.deepcopy(base)), targets="default")
    save_lora(model, tmp_path)
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=copy.deepcopy(base)
    )
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(pipe.transformer), output(model.transformer))


def test_files_of_the_stock_pipeline_load_here(base, tmp_path):
    from diffusers import WanImageToVideoPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = copy.deepcopy(base)
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False)
    )
    WanImageToVideoPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name="default"),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    model = Holder(copy.deepcopy(base))
    load_lora(model, tmp_path)
    assert torch.equal(output(model.transformer), output(transformer))


def test_without_metadata_alpha_is_the_rank_and_it_is_said(model, base, tmp_path):
    file = save_lora(shaken(model, alpha=4), tmp_path)
    save_file(load_file(file), tmp_path / "bare.safetensors")
    loaded = Holder(copy.deepcopy(base))
    with pytest.warns(UserWarning, match="does not say what alpha is; alpha = rank is assumed"):
        load_lora(loaded, tmp_path / "bare.safetensors")
    assert torch.equal(output(loaded.transformer), output(model.transformer))


# --- in other formats


@pytest.mark.parametrize("first", ["peft", "comfy", "diffusers"])
@pytest.mark.parametrize("second", ["peft", "comfy", "diffusers"])
def test_every_format_round_trips(model, base, tmp_path, first, second):
    source = save_lora(shaken(model), tmp_path / "source")
    a = export_lora(source, tmp_path / "a", first)
    b = export_lora(a, tmp_path / "b", second)
    back = export_lora(b, tmp_path / "back", "diffusers")
    assert load_file(back).keys() == load_file(source).keys()
    assert all(torch.equal(load_file(back)[key], value) for key, value in load_file(source).items())
    loaded = Holder(copy.deepcopy(base))
    load_lora(loaded, b.parent)
    assert torch.equal(output(loaded.transformer), output(model.transformer))


def test_comfy_keys_are_those_of_wan_s_own_code(model, tmp_path):
    file = export_lora(save_lora(shaken(model), tmp_path), tmp_path / "wan.safetensors", "comfy")
    assert file == tmp_path / "wan.safetensors"
    keys = load_file(file).keys()
    layers = [
        *(f"self_attn.{x}" for x in "qkvo"),
        *(f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img")),
        "ffn.0",
        "ffn.2",
    ]
    expected = {
        f"diffusion_model.blocks.{i}.{layer}.{kind}"
        for i in range(2)
        for layer in layers
        for kind in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    assert set(keys) == expected


@pytest.mark.parametrize("targets", ["default", EVERYTHING])
def test_the_stock_pipeline_reads_the_comfy_file(model, base, tmp_path, targets):
    """Its converter of ComfyUI files is the oracle of our key map; alpha goes into the matrices there."""
    from diffusers import WanImageToVideoPipeline

    shaken(model, targets=targets)
    file = export_lora(save_lora(model, tmp_path), tmp_path / "wan.safetensors", "comfy")
    converted = WanImageToVideoPipeline.lora_state_dict(str(file))
    assert {key.removeprefix("transformer.") for key in converted} == set(lora_parameters(model))
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=copy.deepcopy(base)
    )
    pipe.load_lora_weights(str(tmp_path), weight_name="wan.safetensors")
    assert torch.allclose(output(pipe.transformer), output(model.transformer), atol=1e-5)
    assert not torch.allclose(output(pipe.transformer), output(base), atol=1e-3)


def test_peft_reads_the_peft_folder(model, base, tmp_path):
    from peft import PeftModel

    shaken(model)
    export_lora(save_lora(model, tmp_path / "source"), tmp_path / "peft", "peft")
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert torch.equal(output(wrapped), output(model.transformer))


def test_comfy_files_of_other_tools_load_here(model, base, tmp_path):
    """lora_down / lora_up, and alpha missing, which means alpha = rank."""
    file = export_lora(save_lora(shaken(model, alpha=4), tmp_path), tmp_path / "wan.safetensors", "comfy")
    renamed = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
        for key, value in load_file(file).items()
        if not key.endswith(".alpha")
    }
    save_file(renamed, tmp_path / "other.safetensors")
    loaded = Holder(copy.deepcopy(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(loaded, tmp_path / "other.safetensors")
    assert torch.equal(output(loaded.transformer), output(model.transformer))
    with pytest.raises(ValueError, match="family: this file does not say which model it is for; name one of wan"):
        read_lora(tmp_path / "other.safetensors")


def test_ranks_and_alphas_may_differ_from_module_to_module(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    ranks = {"blocks.0.attn1.to_q": 2, "blocks.0.attn1.to_k": 2, "blocks.1.attn2.to_v": 3}
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 24, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(24, rank, generator=generator)
    alpha = {"blocks.0.attn1.to_q": 2.0, "blocks.0.attn1.to_k": 7.0, "blocks.1.attn2.to_v": 2.0}
    weights = LoRAWeights(tensors, alpha, "wan")
    outputs = []
    for format in ("diffusers", "peft", "comfy"):
        model = Holder(copy.deepcopy(base))
        assert load_lora(model, write_lora(tmp_path / format, weights, format).parent).alpha == alpha
        outputs.append(output(model.transformer))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for module, rank in ranks.items():
            a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
            merged.get_submodule(module).weight += alpha[module] / rank * b @ a
    assert torch.allclose(outputs[0], output(merged), atol=1e-4)


def test_export_can_cast(model, tmp_path):
    file = export_lora(save_lora(shaken(model), tmp_path), tmp_path / "half", "diffusers", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_files_that_are_not_a_lora(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_lora(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds neither pytorch_lora_weights.safetensors nor"):
        read_lora(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_lora(tmp_path / "broken.safetensors")
    save_file({"unet.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"expected LoRA keys that start with transformer., .*got unet.x"):
        read_lora(tmp_path / "other.safetensors")
    save_file({"transformer.a.lora_A.weight": torch.zeros(1)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"expected pairs .*lora_A.weight, .*got a"):
        read_lora(tmp_path / "half.safetensors")
    save_file({"transformer.a.dora_scale": torch.zeros(1)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="expected pairs"):
        read_lora(tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="format: expected one of diffusers, peft, comfy, got 'kohya'"):
        export_lora(save_lora(shaken(model), tmp_path / "x"), tmp_path / "y", "kohya")


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(model, tmp_path, monkeypatch):
    file = save_lora(shaken(model), tmp_path)
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vcd_fast.models.lora_files.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_lora(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_settings_are_checked():
    from pydantic import ValidationError

    for wrong in ({"rank": 0}, {"alpha": 0}, {"init": "zeros"}, {"ranks": 3}):
        with pytest.raises(ValidationError):
            LoRASettings(**wrong)
