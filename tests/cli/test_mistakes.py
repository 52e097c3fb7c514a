"""What a new user gets wrong ends in one clear message, exit code 1 and no traceback."""

import json
import os
import resource
import subprocess
import sys

import pytest

from vcd_fast.media import read_image, resize_crop, write_image

TINY = ("--model", "wan", "--preset", "tiny")


@pytest.fixture
def folder(picture, tmp_path):
    """Two good pictures of different content with prompts."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = read_image(picture)
    for name, content in (("one", image), ("two", 1 - image)):
        write_image(folder / f"{name}.png", content)
    rows = [
        {"image": "one.png", "prompt": "a cat runs"},
        {"image": "two.png", "prompt": "a dog runs", "held_out": True},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def refused(result, *texts: str) -> None:
    code, _, err = result
    assert code == 1, err
    assert "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    for text in texts:
        assert text in err


def test_missing_weights(vcd, folder, tmp_path):
    words = (
        "train",
        "--model",
        "wan",
        "--pictures",
        folder,
        "--vgg19",
        "random",
        "--enlarge",
        "--output",
        tmp_path / "run",
    )
    refused(vcd(*words), "model.weights: expected a folder or hub name", "tiny-random")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_missing_vgg19_without_network_names_file_and_variable(vcd, folder, tmp_path):
    environment = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch"), "VCD_FAST_VGG19": ""}
    words = ("train", *TINY, "--vgg19", "imagenet", "--pictures", folder, "--output", tmp_path / "run")
    refused(vcd(*words, **environment), "VCD_FAST_VGG19", "vgg19")


def test_a_folder_that_is_no_model(vcd, folder, tmp_path):
    words = ("train", "--model", "wan", "--weights", folder, "--pictures", folder, "--vgg19", "random", "--enlarge")
    refused(vcd(*words, "--output", tmp_path / "run"), "has no folder", "diffusers layout")


def test_a_folder_without_pictures(vcd, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(vcd("train", *TINY, "--pictures", tmp_path / "empty", "--output", tmp_path / "run"), "empty")
    refused(
        vcd("train", *TINY, "--pictures", tmp_path / "nowhere", "--output", tmp_path / "run"), "pictures:", "nowhere"
    )


def test_a_misspelt_key(vcd, folder, tmp_path):
    (tmp_path / "c.yaml").write_text("training: {learning_rte: 1}\n")
    words = ("train", *TINY, "--pictures", folder, "--config", tmp_path / "c.yaml")
    refused(vcd(*words), "unknown key training.learning_rte; did you mean training.learning_rate?")


def test_an_unknown_preset(vcd, folder):
    refused(vcd("train", "--model", "wan", "--preset", "huge", "--pictures", folder), "'huge'", "tiny")


def test_an_image_that_is_too_small_and_a_bad_line_come_in_one_table(vcd, folder, tmp_path):
    write_image(folder / "small.png", resize_crop(read_image(folder / "one.png"), 20, 30))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"image": "small.png", "prompt": "x"}\n{"image": \n{"image": "../secret.png", "prompt": "x"}\n')
    words = ("train", *TINY, "--pictures", folder, "--output", tmp_path / "run")
    refused(vcd(*words), "small.png", "metadata.jsonl, line 4", "metadata.jsonl, line 5")


def test_no_permission(vcd, folder, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.geteuid() == 0:  # root may write anywhere; a file in the way of the folder is refused to everybody
        locked.rmdir()
        locked.write_text("")
    refused(vcd("train", *TINY, "--pictures", folder, "--output", locked / "run"), str(locked))


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_while_saving(folder, tmp_path):
    """A limit on file sizes stands in for the full disk: encodings fit under it, the LoRA of rank 64 does not."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    script = str(__import__("pathlib").Path(__file__).parents[2] / "vcd_fast" / "train.py")
    small = ["--height", "32", "--width", "32", "--num-frames", "5", "--sampling-steps", "1", "--num-projections", "2"]
    words = [*TINY, "--pictures", str(folder), "--output", str(tmp_path / "run"), *small, "--rank", "64"]
    words += ["--max-train-steps", "1"]
    command = [sys.executable, "-c", LIMITED, "400000", script, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    refused((done.returncode, done.stdout, done.stderr), "checkpoint", "could not be written")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("generate", "nowhere.png", "a cat"), ("nowhere.png",)),
        (("generate", "PICTURE", "a cat", *TINY, "--size", "50x50"), ("model.height", "multiple of 16")),
        (("generate", "PICTURE", "a cat", *TINY, "--lora", "nowhere"), ("nowhere",)),
        (("generate", "PICTURE", "a cat", "--weights", "nowhere/else"), ("model.weights",)),
        (("export", "nowhere", "out"), ("nowhere",)),
        (("score", "nowhere.mp4", "--weights", "random"), ("nowhere.mp4",)),
    ],
)
def test_other_verbs(vcd, picture, tmp_path, words, texts):
    words = [str(picture) if word == "PICTURE" else word for word in words]
    refused(vcd(*words, cwd=tmp_path), *texts)
    assert not list(tmp_path.glob("*.mp4"))
