"""Every command of the README is run here or by continuous integration, and its Python as it stands there."""

import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vcd_fast.devices import free_port
from vcd_fast.distance import VGG19Features
from vcd_fast.media import read_image, read_video, write_image, write_video
from vcd_fast.models.wan.tiny import save_tiny_pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]

# Run by continuous integration on a fresh clone: `make test` is what it calls, the plain lines are the Makefile's.
ELSEWHERE = {"make train", "make test"}


@pytest.fixture(scope="module")
def recipe_vgg19(tmp_path_factory) -> Path:
    """A file with VGG19's keys and shapes and weights by recipe (those of the goldens)."""
    state = {}
    for key, value in VGG19Features("random").state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        scale = (2 / (value[0].numel())) ** 0.5 if key.endswith("weight") else 0.01
        state[key] = torch.randn(value.shape, generator=generator) * scale
    path = tmp_path_factory.mktemp("vgg19") / "vgg19.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the README's user has: a picture, a video of it, pictures with prompts, a model."""
    folder = tmp_path_factory.mktemp("user")
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6), (48, 64), mode="bicubic").clamp(0, 1)[0]
    write_image(folder / "picture.png", picture)
    write_video(folder / "video.mp4", torch.stack([picture.roll(k, -1) for k in range(5)]), 16)
    (folder / "PICTURES").symlink_to(ROOT / "examples" / "pictures")
    save_tiny_pipeline(folder / "WEIGHTS")
    (folder / "vcd_fast").symlink_to(ROOT / "vcd_fast")
    return folder


def run(command: str, place: Path, vgg19: Path, *extra: str) -> subprocess.CompletedProcess:
    """A README line in that folder, with the programs of this environment."""
    tools = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": tools + os.pathsep + os.environ["PATH"], "VCD_FAST_VGG19": str(vgg19)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*shlex.split(command), *extra], cwd=place, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(code, recipe_vgg19):
    environment = {**os.environ, "VCD_FAST_VGG19": str(recipe_vgg19), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_continuous_integration_runs_the_two_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert all(f"\n{command}" in script for command in ELSEWHERE)


def test_the_first_five_lines_compute_the_distance():
    assert README.index("```python") < README.index("```bash")
    assert sum(bool(line.strip()) for line in PYTHON[0].splitlines()) <= 5


def test_the_plain_lines_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for variable, value in (
        ("$(PYTHON)", "python3"),
        ("$(BIN)", ".venv/bin"),
        ("$(VENV)", ".venv"),
        ("$(RUN)", "runs/first"),
    ):
        makefile = makefile.replace(variable, value)
    recipes = {line.strip().replace(" -q ", " ") for line in makefile.splitlines() if line.startswith("\t")}
    plain = [line for line in COMMANDS if line.startswith((".venv", "python3 -m venv", "OMP_NUM_THREADS"))]
    assert len(plain) == 5
    assert set(plain) <= recipes


def test_score(place, recipe_vgg19):
    (command,) = [line for line in COMMANDS if line.startswith("vcd score")]
    done = run(command, place, recipe_vgg19)
    assert "relu3_1" in done.stdout
    assert (place / "score.json").exists()
    assert read_image(place / "score.png").shape[0] == 3


# What a machine without a GPU takes off the settings of the paper; the README's words stay.
SMALLER = ("--height", "32", "--width", "48", "--num-frames", "5", "--sampling-steps", "2", "--num-projections", "4")
SMALLER += (
    "--max-train-steps",
    "2",
    "--gradient-accumulation",
    "1",
    "--rank",
    "2",
    "--alpha",
    "2",
    "--dtype",
    "float32",
)


# The stand-in for the weights is nobody's checkpoint; the step cache is told to treat it as the one the preset means.
STAND_IN = ("--cache-coefficients", "wan2.1-fun-1.3b")


def test_dry_run_of_the_real_setting(place, recipe_vgg19):
    (command,) = [line for line in COMMANDS if line.startswith("vcd train")]
    done = run(command, place, recipe_vgg19, *STAND_IN)
    assert "25 frames of 368x272" in done.stdout
    assert "last:1: steps 29 of 0..29" in done.stdout
    assert not (place / "runs").exists()


def test_train_generate_export(place, recipe_vgg19):
    """One after another, as a user would; the launcher starts two ranks here, there being no GPU to count."""
    (train,) = [line for line in COMMANDS if line.startswith("deepspeed")]
    run(
        train.replace("deepspeed ", f"deepspeed --num_gpus 2 --master_port {free_port()} "),
        place,
        recipe_vgg19,
        "--zero",
        "2",
        *STAND_IN,
        *SMALLER,
    )
    assert (place / "runs" / "wan" / "lora" / "pytorch_lora_weights.safetensors").exists()

    (generate,) = [line for line in COMMANDS if line.startswith("vcd generate")]
    run(generate, place, recipe_vgg19, "--size", "48x32", "--frames", "5", "--steps", "2")
    assert read_video(place / "cat.mp4")[0].shape == (5, 3, 32, 48)

    (export,) = [line for line in COMMANDS if line.startswith("vcd export")]
    run(export, place, recipe_vgg19)
    assert (place / "cat-lora.safetensors").exists()


def test_no_command_is_left_out():
    tested = (
        "vcd score",
        "vcd train",
        "vcd generate",
        "vcd export",
        "deepspeed",
        ".venv/bin",
        "python3 -m venv",
        "OMP_NUM_THREADS",
    )
    assert [line for line in COMMANDS if line not in ELSEWHERE and not line.startswith(tested)] == []


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
