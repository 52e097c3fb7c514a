"""The folder of kernels: a package only through vcd_fast, importing nothing but torch and triton."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import vcd_fast.kernels

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "kernels").glob("*.py"))
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)


def test_it_is_a_package_by_the_shim_alone():
    assert [Path(path) for path in vcd_fast.kernels.__path__] == [ROOT / "kernels"]
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would become importable as a top-level `kernels`"
    assert len(FILES) > 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_imports_torch_and_triton_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "kernels know each other and nobody else"
    assert importlib.util.find_spec(f"vcd_fast.kernels.{path.stem}") is not None


def test_importing_the_kernels_touches_no_device():
    program = (
        "import torch; import vcd_fast.kernels.count, vcd_fast.kernels.rows; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
