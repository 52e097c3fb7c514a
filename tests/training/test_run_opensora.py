"""Open-Sora from outside: a tiny model trained, sampled, exported. What a run survives is tested with Wan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vcd_fast.config import compose, parse
from vcd_fast.media import read_video
from vcd_fast.models.lora import read_lora
from vcd_fast.models.opensora import load_vader
from vcd_fast.models.opensora.settings import TRANSFORMER
from vcd_fast.training import log
from vcd_fast.training.dry_run import describe

ROOT = Path(__file__).parents[2]
TINY = ("--model", "opensora", "--preset", "tiny")
SMALL = """
model: {height: 36, width: 48, guidance_scale: 2}
lora: {rank: 2, alpha: 4}
rollout: {sampling_steps: 2}
reward: {num_projections: 4, frames_per_step: 1}
training: {max_train_steps: 3, checkpoint_every: 0, sample_every: 0, device: cpu}
"""
DECODED = (32, 48)
"""36 rows are asked for, 32 decoded"""


@pytest.fixture(scope="module")
def tiny_run(training, small_pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("opensora")
    (folder / "small.yaml").write_text(SMALL)
    words = (*TINY, "--config", folder / "small.yaml", "--pictures", small_pictures, "--output", folder / "run")
    code, out, err = training(*words)
    assert code == 0, err
    assert "random" in err, "weights of no meaning are announced"
    assert "held-out VCD, same noise:" in out
    return folder / "run"


@pytest.fixture(scope="module")
def vcd():
    """Runs `vcd WORDS` as a user would."""

    def run(*words: object) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", "vcd_fast.cli.main", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    return run


class TestWhatARunLeaves:
    def test_every_step_is_logged_and_moves_the_lora(self, tiny_run):
        lines = [line for line in log.read(tiny_run / "log.jsonl") if line["kind"] == "train"]
        assert [line["step"] for line in lines] == [0, 1, 2]
        assert all(line["applied"] and line["grad_norm"] > 0 for line in lines)
        summary = json.loads((tiny_run / "summary.json").read_text())
        assert summary["updates"] == 3
        assert summary["held_out_vcd_before"] != summary["held_out_vcd_after"]

    def test_samples_are_videos_of_the_decoded_size(self, tiny_run):
        base, tuned = (read_video(tiny_run / "samples" / name / "3-0.mp4") for name in ("base", "step-000003"))
        assert tuned[0].shape == (17, 3, *DECODED)
        assert tuned[1] == 24
        assert not torch.equal(base[0], tuned[0])

    def test_the_lora_is_on_the_layers_of_the_paper(self, tiny_run):
        lora = read_lora(tiny_run / "lora", "opensora")
        assert set(lora.alpha.values()) == {4}
        kinds = {module.rpartition(".")[2] for module in lora.modules}
        assert kinds == {"qkv", "q_linear", "kv_linear"}
        assert all(lora.tensors[f"{module}.lora_B.weight"].abs().max() > 0 for module in lora.modules)
        with safe_open(tiny_run / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.r"] == 2


@pytest.mark.slow
def test_overfitting_lowers_the_distance(training, small_pictures, tmp_path):
    """One picture, one noise, 60 steps of the gradient through the last sampling step; uphill they raise it by 5 %."""
    words = [*TINY, "--pictures", small_pictures, "--overfit", "--height", 32, "--width", 32]
    words += ["--frames-per-step", 4, "--num-projections", 16, "--learning-rate", "2e-2"]
    words += ["--sample-every", 0, "--checkpoint-every", 0, "--device", "cpu", "--output", tmp_path / "run"]
    code, _, err = training(*words, timeout=580)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["updates"], summary["skipped"]) == (60, 0)
    (before,), (after,) = summary["held_out_vcd_before"].values(), summary["held_out_vcd_after"].values()
    assert after < 0.98 * before


class TestMistakes:
    """Said before anything is downloaded or loaded."""

    def test_no_weights(self, training, small_pictures, tmp_path):
        words = ("--model", "opensora", "--pictures", small_pictures, "--output", tmp_path / "run")
        code, _, err = training(*words, VCD_FAST_VGG19="", HF_HOME=str(tmp_path), TORCH_HOME=str(tmp_path))
        assert code == 1
        assert "error: model.weights: expected a folder or hub name of Open-Sora 1.2's transformer" in err
        assert "The presets are --preset 240p and --preset tiny" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--num-frames 50", "expected a multiple of 17, what the VAE was trained with; the nearest are 34 and 51"),
            ("--height 8", "model.height: input should be greater than or equal to 16"),
            ("--height 144 --width 160", "choose a smaller height and width, or set enlarge"),
            ("--width 64 --weights . --vae-weights ./nowhere", "model.vae_weights: no such folder: ./nowhere"),
        ],
    )
    def test_others(self, words, message, small_pictures, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises((ValueError, OSError), match=message):
            describe(parse([*TINY, "--pictures", str(small_pictures), *words.split()], "train")[0])


class TestVerbs:
    def test_generate_writes_every_frame_and_says_their_size(self, vcd, tiny_run, small_pictures, tmp_path):
        words = ("generate", small_pictures / "0.png", "the cat runs", *TINY, "--steps", 2, "--guidance", 2)
        words += ("--lora", tiny_run / "lora", "--size", "48x36", "--frames", 34, "-o", tmp_path / "video.mp4")
        done = vcd(*words)
        assert "34 frames of 48x32, 24 fps" in done.stdout
        video, fps = read_video(tmp_path / "video.mp4")
        assert video.shape == (34, 3, *DECODED)
        assert fps == 24

    def test_export_for_vader_and_back(self, vcd, tiny_run, tmp_path):
        vcd("export", tiny_run / "lora", tmp_path / "lora.pt", "--format", "vader")
        before, after = read_lora(tiny_run / "lora", "opensora"), load_vader(tmp_path / "lora.pt")
        assert before.modules == after.modules
        for module in before.modules:
            effect = [
                weights.alpha[module]
                * weights.tensors[f"{module}.lora_B.weight"]
                @ weights.tensors[f"{module}.lora_A.weight"]
                for weights in (before, after)
            ]
            assert effect[0].abs().max() > 0
            assert torch.allclose(*effect, rtol=1e-6, atol=0)


class TestDryRun:
    """The plan needs configurations, no weights."""

    def plan(self, preset: str, pictures: Path, **model: object) -> str:
        settings = {"model": model, "data": {"pictures": str(pictures), "enlarge": True}}
        return describe(compose("opensora", preset, settings))

    def test_tiny(self, small_pictures):
        plan = self.plan("tiny", small_pictures)
        assert "17 frames of 96x64, 24 fps" in plan
        assert "9,216 LoRA parameters (rank 4, alpha 2) on 342,880 frozen ones" in plan

    def test_published(self, small_pictures):
        plan = self.plan("240p", small_pictures)
        assert "51 frames of 368x276" in plan
        assert "30 steps, guidance 7" in plan
        assert "last:1: steps 29 of 0..29" in plan
        assert "on 1,207,643,936 frozen ones" in plan
        assert TRANSFORMER in plan

    def test_a_folder_with_a_configuration(self, small_pictures, tmp_path):
        config = {"architectures": ["STDiT3"], "hidden_size": 64, "depth": 2, "num_heads": 4, "caption_channels": 32}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "on 342,880 frozen ones" in self.plan("240p", small_pictures, weights=str(tmp_path))

    def test_a_folder_without(self, small_pictures, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json is missing; it describes the model"):
            self.plan("240p", small_pictures, weights=str(tmp_path))
