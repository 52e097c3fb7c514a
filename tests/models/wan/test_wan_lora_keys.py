import pytest
from torch import nn

from vcd_fast.models.wan import comfy_module_name, model_module_name
from vcd_fast.models.wan.tiny import tiny_transformer


def test_every_linear_layer_has_a_name_in_wan_s_own_code_and_back():
    names = [name for name, module in tiny_transformer().named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 2 * 12 + 8
    comfy = [comfy_module_name(name) for name in names]
    assert len(set(comfy)) == len(names)
    assert [model_module_name(name) for name in comfy] == names


@pytest.mark.parametrize(
    ("name", "comfy"),
    [
        ("blocks.7.attn1.to_q", "blocks.7.self_attn.q"),
        ("blocks.12.attn2.to_out.0", "blocks.12.cross_attn.o"),
        ("blocks.0.attn2.add_v_proj", "blocks.0.cross_attn.v_img"),
        ("blocks.0.ffn.net.0.proj", "blocks.0.ffn.0"),
        ("condition_embedder.time_proj", "time_projection.1"),
    ],
)
def test_names(name, comfy):
    assert comfy_module_name(name) == comfy
    assert model_module_name(comfy) == name


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"a linear layer in WanTransformer3DModel, got 'blocks.0.attn3.to_q'"):
        comfy_module_name("blocks.0.attn3.to_q")
    with pytest.raises(ValueError, match=r"a linear layer in Wan's own code, got 'blocks.0.attn1.to_q'"):
        model_module_name("blocks.0.attn1.to_q")
