"""The entry script from outside: what a run leaves, and what it survives."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vcd_fast.media import read_video
from vcd_fast.training import log
from vcd_fast.training.checkpoint import list_complete

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def undisturbed(training, small_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, out, err = training(*small_run, "--output", output)
    assert code == 0, err
    return output, out


def wait_for_step(output, step: int, process, timeout: float = 200) -> None:
    """Until the log has the line of a step."""
    started = time.monotonic()
    while not (output / "log.jsonl").exists() or f'"train", "step": {step},' not in (output / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < timeout
        time.sleep(0.02)


def same_weights(first, second) -> bool:
    a, b = load_file(first / LORA), load_file(second / LORA)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestWhatARunLeaves:
    def test_it_says_held_out_distance_before_and_after(self, undisturbed):
        output, out = undisturbed
        summary = json.loads((output / "summary.json").read_text())
        assert (summary["step"], summary["updates"], summary["skipped"]) == (6, 6, 0)
        assert summary["held_out_vcd_before"].keys() == summary["held_out_vcd_after"].keys() == {"3-0"}
        assert summary["held_out_vcd_before"] != summary["held_out_vcd_after"]
        assert "held-out VCD, same noise:" in out

    def test_every_step_is_logged_with_reward_norm_memory_and_phases(self, undisturbed):
        lines = [line for line in log.read(undisturbed[0] / "log.jsonl") if line["kind"] == "train"]
        assert [line["step"] for line in lines] == list(range(6))
        assert all(line["applied"] and line["grad_norm"] > 0 and line["memory_gib"] > 0 for line in lines)
        assert all({"rollout", "decode", "reward", "backward", "optimizer"} == line["seconds"].keys() for line in lines)
        assert all(line["reward"] == pytest.approx(-line["vcd"]) for line in lines)

    def test_samples_are_videos_beside_the_base_at_the_same_noise(self, undisturbed):
        samples = undisturbed[0] / "samples"
        assert sorted(folder.name for folder in samples.iterdir()) == ["base", "step-000006"]
        video, fps = read_video(samples / "step-000006" / "3-0.mp4")
        assert video.shape == (5, 3, 32, 32)
        assert fps == 16
        assert (samples / "step-000006" / "3-0.png").stat().st_size > 1000

    def test_the_record_says_where_the_numbers_come_from(self, undisturbed):
        output, _ = undisturbed
        start = json.loads((output / "run.json").read_text())["starts"][0]
        assert start["packages"]["torch"] == torch.__version__
        assert len(start["data_hash"]) >= 32
        assert "family: wan" in (output / "config.yaml").read_text()
        assert (output / "reward.png").stat().st_size > 5000

    def test_the_lora_carries_its_alpha(self, undisturbed):
        with safe_open(undisturbed[0] / LORA, framework="pt") as file:
            assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 2

    def test_checkpoints_are_pruned(self, undisturbed):
        assert [path.name for path in list_complete(undisturbed[0])] == ["step-00000004", "step-00000006"]

    def test_a_config_file_written_by_a_run_repeats_it(self, undisturbed, training, tmp_path):
        output, _ = undisturbed
        code, _, err = training("--config", output / "config.yaml", "--output", tmp_path / "again")
        assert code == 0, err
        assert same_weights(output, tmp_path / "again")


class TestInterruption:
    @pytest.mark.parametrize("step", [0, 3])
    def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(
        self, undisturbed, start_training, training, small_run, tmp_path, step
    ):
        """Killed at a random moment after that step: in the next one, while a checkpoint is written, or between."""
        output = tmp_path / "killed"
        process = start_training(*small_run, "--output", output)
        wait_for_step(output, step, process)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished = (output / "summary.json").exists()
        left = bool(list_complete(output))
        code, out, err = training(*small_run, "--output", output)
        assert code == 0, err
        assert finished or ("resumed from step" in out) == left
        assert same_weights(undisturbed[0], output)
        mine, theirs = (log.read(folder / "log.jsonl") for folder in (output, undisturbed[0]))
        for line in (*mine, *theirs):
            for name in ("seconds", "memory_gib"):
                line.pop(name, None)
        assert mine == theirs

    def test_sigterm_leaves_a_checkpoint_and_a_sentence(
        self, undisturbed, start_training, training, small_run, tmp_path
    ):
        output = tmp_path / "terminated"
        process = start_training(*small_run, "--output", output, "--checkpoint-every", "0")
        wait_for_step(output, 0, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "stopped by SIGTERM" in out
        assert len(list_complete(output)) == 1
        code, _, err = training(*small_run, "--output", output, "--checkpoint-every", "0")
        assert code == 0, err
        assert same_weights(undisturbed[0], output)


def test_steps_that_are_not_finite_are_skipped_counted_and_stop_the_run(training, small_run, tmp_path):
    """A learning rate that throws the weights to infinity: the one step before it shows is applied, no other is."""
    output = tmp_path / "run"
    code, out, err = training(
        *small_run, "--output", output, "--learning-rate", "1e30", "--max-bad-steps", "3", "--checkpoint-every", "1"
    )
    assert code == 1
    assert "error: max_bad_steps: reward or gradient was not finite in 3 steps in a row" in err
    assert out.count("skipped reward or gradient not finite") == 3
    applied = [line["applied"] for line in log.read(output / "log.jsonl") if line["kind"] == "train"]
    assert applied == [True, False, False, False]
    kept = [load_file(path / "lora.safetensors") for path in list_complete(output)]
    assert len(kept) == 2
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_a_run_does_not_go_on_where_it_cannot(undisturbed, training, small_run):
    output, _ = undisturbed
    code, _, err = training(*small_run, "--output", output, "--max-train-steps", "3")
    assert code == 1
    assert "max_train_steps: expected at least 6" in err
    code, _, err = training(*small_run, "--output", output, "--alpha", "64", "--max-train-steps", "7")
    assert code == 1
    assert "lora.alpha: 2.0 -> 64.0" in err


class TestOverfit:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_sixty_steps_lower_the_distance_of_the_clip(self, training, small_pictures, tmp_path, seed):
        options = ["--model", "wan", "--preset", "tiny", "--pictures", PICTURES, "--overfit"]
        options += ["--height", 32, "--width", 48, "--num-frames", 5]
        options += ["--sample-every", "0", "--checkpoint-every", "0", "--seed", seed, "--output", tmp_path / "run"]
        code, _, err = training(*options, timeout=580)
        assert code == 0, err
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        (before,), (after,) = summary["held_out_vcd_before"].values(), summary["held_out_vcd_after"].values()
        assert after < 0.95 * before
