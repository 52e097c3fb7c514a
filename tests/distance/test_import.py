"""`import vcd_fast` is light: nothing of the GPU, of diffusion models or of pictures comes with it."""

import subprocess
import sys

HEAVY = (
    "triton",
    "numba",
    "diffusers",
    "transformers",
    "peft",
    "deepspeed",
    "matplotlib",
    "PIL",
    "av",
    "typer",
    "pydantic",
    "torchvision",
)


def test_import_takes_no_device_and_no_heavy_package():
    code = f"""
import torch, sys
def refuse(*args, **kwargs):
    raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = refuse
before = set(sys.modules)
import vcd_fast
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & set({HEAVY!r}), new & set({HEAVY!r})
assert not torch.cuda.is_initialized()
assert "vcd_fast.models" not in sys.modules
video = torch.rand(1, 2, 3, 8, 8)
vcd_fast.VCDLoss(extractor=lambda x: {{"x": x}}, layers=("x",), num_projections=2)(video.requires_grad_()).backward()
assert not torch.cuda.is_initialized()
print(vcd_fast.__version__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names():
    import vcd_fast

    assert set(vcd_fast.__all__) == {
        "PRESETS",
        "VCDConfig",
        "VCDLoss",
        "VGG19Features",
        "__version__",
        "sliced_wasserstein",
        "sort_target",
        "vcd_loss",
    }
    assert all(hasattr(vcd_fast, name) for name in vcd_fast.__all__)
