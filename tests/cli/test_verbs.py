"""`vcd` from outside: what its verbs write, and how they end when something is wrong."""

import json

import pytest
import torch

from vcd_fast.cli.generate import check_outputs, parse_size
from vcd_fast.media import read_image, read_video, write_image
from vcd_fast.models.lora import LoRASettings, add_lora, read_lora, save_lora
from vcd_fast.models.wan import ModelSettings, load_model
from vcd_fast.version import __version__

TINY = ("--model", "wan", "--preset", "tiny")
SMALL = ("--size", "48x32", "--frames", "5", "--steps", "2")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    with pytest.warns(UserWarning, match="random"):
        model = load_model(ModelSettings(weights="tiny-random", dtype="float32"))
    for name, parameter in add_lora(model, LoRASettings(rank=2, alpha=8), seed=0).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return save_lora(model, tmp_path_factory.mktemp("lora")).parent


def test_help_names_the_verbs_and_version_the_version(vcd):
    code, out, _ = vcd("--help")
    assert code == 0
    assert all(verb in out for verb in ("score", "generate", "train", "export"))
    assert vcd("--version")[1].strip() == __version__


class TestGenerate:
    def test_a_picture_becomes_a_video_per_seed_with_its_true_rate(self, vcd, picture, tmp_path):
        output = tmp_path / "out.mp4"
        words = (
            "generate",
            picture,
            "a cat runs",
            *TINY,
            *SMALL,
            "--fps",
            "12",
            "-o",
            output,
            "--seed",
            1,
            "--seed",
            2,
        )
        code, out, err = vcd(*words)
        assert code == 0, err
        first, fps = read_video(tmp_path / "out-1.mp4")
        second, _ = read_video(tmp_path / "out-2.mp4")
        assert (first.shape, fps) == ((5, 3, 32, 48), 12)
        assert (first - second).abs().mean() > 0.01
        assert (tmp_path / "out-strip.png").exists()
        assert "random" in err
        assert "5 frames of 48x32" in out

    def test_a_lora_changes_the_video_and_scale_zero_is_the_base(self, vcd, picture, lora, tmp_path):
        words = ("generate", picture, "a cat runs", *TINY, *SMALL, "--no-strip")
        videos = {}
        for name, extra in (("base", ()), ("tuned", ("--lora", lora)), ("zero", ("--lora", lora, "--lora-scale", "0"))):
            code, _, err = vcd(*words, *extra, "-o", tmp_path / f"{name}.mp4")
            assert code == 0, err
            videos[name] = read_video(tmp_path / f"{name}.mp4")[0]
        assert torch.equal(videos["base"], videos["zero"])
        assert (videos["base"] - videos["tuned"]).abs().mean() > 0.005

    def test_without_a_model_named_the_small_one_is_used_and_said_so(self, vcd, picture, tmp_path):
        code, out, err = vcd("generate", picture, "the camera pans left", "--steps", "2", "--no-strip", cwd=tmp_path)
        assert code == 0, err
        assert "no --preset or --weights: tiny-i2v" in out
        (found,) = tmp_path.glob("*.mp4")
        assert read_video(found)[0].shape == (9, 3, 64, 96)

    def test_the_picture_itself_is_never_overwritten(self, vcd, picture):
        before = picture.read_bytes()
        code, _, err = vcd("generate", picture, "a cat runs", *TINY, "-o", picture)
        assert code == 1
        assert "output" in err
        with pytest.raises(ValueError, match="would overwrite the picture"):
            check_outputs(picture, picture.with_suffix(".mp4"), picture)
        assert picture.read_bytes() == before

    @pytest.mark.parametrize("text", ["368", "axb", "0x16", "368x272x3", "-16x16"])
    def test_sizes_that_are_none(self, text):
        with pytest.raises(ValueError, match="size: expected WIDTHxHEIGHT"):
            parse_size(text)


class TestExport:
    @pytest.mark.parametrize("format", ["comfy", "peft", "diffusers"])
    def test_every_format_holds_the_same_lora(self, vcd, lora, tmp_path, format):
        target = tmp_path / ("lora.safetensors" if format == "comfy" else "lora")
        code, _, err = vcd("export", lora, target, "--format", format, "--model", "wan")
        assert code == 0, err
        before, after = read_lora(lora, "wan"), read_lora(target, "wan")
        assert before.alpha == after.alpha
        assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)

    def test_an_unknown_format_is_refused(self, vcd, lora, tmp_path):
        code, _, err = vcd("export", lora, tmp_path / "x", "--format", "kohya", "--model", "wan")
        assert code == 1
        assert "kohya" in err
        assert "comfy" in err


class TestTrain:
    def test_dry_run_prints_the_plan_and_writes_nothing(self, vcd, picture_folder, tmp_path):
        output = tmp_path / "run"
        words = (
            "train",
            *TINY,
            "--pictures",
            picture_folder,
            "--output",
            output,
            "--backprop",
            "spaced:3",
            "--dry-run",
        )
        code, out, err = vcd(*words)
        assert code == 0, err
        for text in (
            "6 steps, guidance 5 (2 forwards per step)",
            "spaced:3",
            "3,072 LoRA parameters",
            "2 of frames 1..8",
        ):
            assert text in out
        assert not output.exists()

    def test_help_is_the_trainers(self, vcd):
        code, out, _ = vcd("train", "--help")
        assert code == 0
        assert "--learning-rate" in out


@pytest.fixture(scope="module")
def picture_folder(picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    for name, image in (("one", read_image(picture)), ("two", 1 - read_image(picture))):
        write_image(folder / f"{name}.png", image)
    rows = [
        {"image": f"{name}.png", "prompt": f"a cat runs {name}", "held_out": name == "two"} for name in ("one", "two")
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
