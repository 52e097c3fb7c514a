"""What a wheel holds, and that the folder `kernels/` of a checkout never passes for the package of that name on PyPI."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny_i2v" / "model"


def python(code: str, cwd: Path, *path: Path, **environment: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True, timeout=120)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return next(folder.glob("*.whl"))


def test_a_wheel_brings_vcd_fast_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top = next(name for name in names if name.endswith("top_level.txt"))
        assert archive.read(top).decode().split() == ["vcd_fast"]
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"vcd_fast"}
    assert "vcd_fast/presets/wan/tiny.yaml" in names
    assert "vcd_fast/kernels.py" in names
    model = {f"vcd_fast/tiny_i2v/{path.relative_to(MODEL)}" for path in MODEL.rglob("*") if path.is_file()}
    assert model <= set(names)
    sources = {f"vcd_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py") if tracked(path)}
    assert sources <= set(names)
    assert not any(name.startswith("vcd_fast/kernels/__init__") for name in names)


def tracked(path: Path) -> bool:
    return not subprocess.run(
        ["git", "ls-files", "--error-unmatch", str(path)], cwd=ROOT, capture_output=True
    ).returncode


def test_the_installed_kernels_are_those_of_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import vcd_fast, vcd_fast.kernels as k; print(vcd_fast.__file__); print(*k.__path__)"
    # The editable install of the checkout must not win: its finder comes after PYTHONPATH.
    package, kernels = python(code, tmp_path, tmp_path / "site").splitlines()
    assert package.startswith(str(tmp_path / "site"))
    assert kernels == str(tmp_path / "site" / "vcd_fast" / "kernels")


def test_the_installed_small_model_is_that_of_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from vcd_fast.models.wan.loading import bundled_model; print(bundled_model())"
    assert python(code, tmp_path, tmp_path / "site") == str(tmp_path / "site" / "vcd_fast" / "tiny_i2v")


def test_the_checkout_finds_its_kernels():
    assert python("import vcd_fast.kernels as k; print(*k.__path__)", ROOT) == str(ROOT / "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_diffusers_and_transformers_import_from_the_root_of_the_checkout():
    code = """
        import transformers.modeling_utils, diffusers
        from diffusers.utils import is_kernels_available
        from transformers.utils import is_kernels_available as in_transformers
        print(is_kernels_available(), in_transformers())
    """
    assert python(code, ROOT) == "False False"


def test_the_entry_script_leaves_the_name_kernels_to_its_owner(tmp_path):
    """`python vcd_fast/train.py` puts vcd_fast/ first on the path; a real `kernels` distribution must still be the one imported."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.17.2'\n")
    information = tmp_path / "kernels-0.17.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    # A checkout of its own, in which the script says what it imports instead of training.
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "vcd_fast", checkout / "vcd_fast", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", checkout / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    script = checkout / "vcd_fast" / "train.py"
    content = script.read_text()
    assert "    main(sys.argv[1:])" in content
    script.write_text(content.replace("    main(sys.argv[1:])", "    import kernels\n\n    print(kernels.__file__)"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(package / "__init__.py")


def test_help_takes_no_weights_and_no_device():
    command = [sys.executable, str(ROOT / "vcd_fast" / "train.py"), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--learning-rate" in done.stdout
    assert "training: how long" in done.stdout
