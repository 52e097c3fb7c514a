"""The published size, without the published weights."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vcd_fast.models.opensora.attention import Text
from vcd_fast.models.opensora.blocks import Block
from vcd_fast.models.opensora.embeddings import rope_frequencies, rope_table
from vcd_fast.models.opensora.transformer import STDiT3

ROOT = Path(__file__).parents[3]
GIB = 2**30

LOAD = """
import json, resource, sys
import torch
from vcd_fast.models.opensora.loading import load_transformer
from vcd_fast.models.opensora.transformer import STDiT3
from pathlib import Path
folder = Path(sys.argv[1])
if sys.argv[2] == "from_pretrained":
    model = STDiT3.from_pretrained(folder, torch_dtype=torch.bfloat16)
else:
    model = load_transformer(folder, torch.bfloat16)
sums = {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}
assert not any(tensor.is_meta for tensor in model.state_dict().values())
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "sums": sums}))
"""


def test_memory_of_a_differentiated_step():
    """51 frames of (276, 368), both branches of guidance, LoRA: 1.5 GiB and one block, beyond the weights."""
    counts = runpy.run_path(str(ROOT / "tools" / "opensora_memory.py"))["step"](2, 276, 368, 51)
    assert counts["block checkpointing"] <= 1.5
    assert counts["one block"] <= 0.6
    assert counts["no checkpointing"] > 25, "attention that keeps no scores"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """XL/2 with random weights in bfloat16, 2.4 GB, and the sums of its tensors."""
    folder = tmp_path_factory.mktemp("xl2")
    with torch.device("meta"):
        model = STDiT3()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    state["rope.freqs"] = rope_frequencies(72).bfloat16()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    model.save_config(folder)
    return folder, {name: tensor.double().sum().item() for name, tensor in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["from_pretrained", "load_transformer"])
def test_full_size_copy_is_loaded_in_8_gb(how, copy):
    folder, sums = copy
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size > 2.4e9
    command = [sys.executable, "-c", LOAD, str(folder), how]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"{how}: peak {found['peak'] / GIB:.2f} GiB")
    assert found["sums"] == sums
    assert found["peak"] < 8e9


@pytest.mark.slow
@pytest.mark.parametrize("temporal", [False, True])
def test_one_block_of_full_size_forward_and_backward(temporal):
    """All tokens of 51 frames of (276, 368) through one block."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    block = Block(1152, 16, 4.0, qk_norm=True, temporal=temporal).requires_grad_(False)
    tokens = torch.randn(1, 15, 17 * 23, 1152, generator=generator).requires_grad_()
    text = Text(torch.randn(1, 40, 1152, generator=generator))
    modulation = 0.1 * torch.randn(1, 15, 6, 1152, generator=generator)
    rope = rope_table(15, 72, torch.device("cpu")) if temporal else None
    output = block(tokens, text, modulation, rope)
    assert output.shape == tokens.shape
    output.square().mean().backward()
    assert output.isfinite().all()
    assert tokens.grad.isfinite().all()
    assert tokens.grad.abs().amax(dim=(0, 2, 3)).min() > 0
