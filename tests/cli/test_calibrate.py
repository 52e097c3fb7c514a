"""From `vcd calibrate` to a run that uses its file."""

import json
import warnings

import pytest
import yaml

from vcd_fast.cli.calibrate import calibrate
from vcd_fast.config import compose
from vcd_fast.media import read_image, write_image
from vcd_fast.training.dry_run import describe

STEPS = 12
CONFIG = """
model: {height: 32, width: 32, num_frames: 5, guidance_scale: 2}
lora: {rank: 2, alpha: 2}
rollout: {sampling_steps: 12, backprop: last:3, step_cache: teacache}
reward: {num_projections: 4, frames_per_step: 1}
training: {max_train_steps: 2, checkpoint_every: 0, sample_every: 0, sample_pictures: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def pictures(picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_image(folder / "0.png", read_image(picture))
    write_image(folder / "1.png", read_image(picture).flip(0))
    rows = [{"image": f"{index}.png", "prompt": "a cat runs", "held_out": index == 1} for index in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fit(pictures, output, **options):
    defaults = {"model": "wan", "preset": "tiny", "weights": None, "steps": STEPS, "mode": None}
    defaults |= {"limit": 70, "seed": 0, "plot": None, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.weights=tiny-random")
        calibrate(pictures, output, **{**defaults, **options})
    return output


@pytest.fixture(scope="module")
def calibrated(pictures, tmp_path_factory):
    return fit(pictures, tmp_path_factory.mktemp("calibrated") / "fit.json")


def test_the_fit_is_reported(pictures, tmp_path, capsys):
    path = fit(pictures, tmp_path / "fit.json", plot=tmp_path / "fit.png")
    out = capsys.readouterr().out
    assert (tmp_path / "fit.png").stat().st_size > 1000
    content = json.loads(path.read_text())
    assert len(content["coefficients"]) == 5
    assert content["pictures"] == 2
    assert content["observations"] == 2 * 2 * (STEPS - 5)  # clips, branches, steps that may be skipped
    assert 0 <= content["r_squared"] <= 1
    assert f"R² {content['r_squared']:.3f} on 28 steps of 2 clips" in out
    assert f"of {STEPS} steps computed" in out


def test_a_run_with_the_cache(vcd, calibrated, pictures, tmp_path):
    data = {"data": {"pictures": str(pictures)}}
    with pytest.raises(
        ValueError, match=r"no coefficients are known for WanTransformer3DModel, num_layers 2.*calibrate"
    ):
        describe(compose("wan", "tiny", yaml.safe_load(CONFIG), data))
    cache = {"rollout": {"cache_coefficients": str(calibrated), "cache_threshold": 0.9}}
    sharded = {"rollout": {"checkpointing": "both"}, "training": {"zero": 3}}
    with pytest.raises(ValueError, match=r"rollout\.checkpointing: .* ZeRO stage 3 expected block or none, got both"):
        describe(compose("wan", "tiny", yaml.safe_load(CONFIG), data, cache, sharded))
    rows = describe(compose("wan", "tiny", yaml.safe_load(CONFIG), data, cache)).splitlines()
    plan = next(row for row in rows if row.startswith("step cache")).split(maxsplit=2)[2]
    steps = plan.partition(":")[0]
    assert len(steps) == STEPS
    assert set(steps) == {"C", "."}
    assert steps.startswith("CCCCC")
    assert steps[-3] == "C"

    (tmp_path / "small.yaml").write_text(CONFIG)
    words = ["train", "--model", "wan", "--preset", "tiny", "--config", tmp_path / "small.yaml", "--pictures", pictures]
    words += ["--cache-coefficients", calibrated, "--cache-threshold", "0.9", "--output", tmp_path / "run"]
    code, out, err = vcd(*words)
    assert code == 0, err
    assert "".join(plan.split()) in "".join(out.split())  # whatever the width of the terminal is
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["computed_steps"] for line in trained] == [steps.count("C")] * 2
    assert all(line["applied"] and line["grad_norm"] > 0 for line in trained)
    drifts = [line for line in lines if line["kind"] == "step_cache"]
    assert [line["step"] for line in drifts] == [0, 2]
    assert all(0 < line["drift"] < 1 and line["computed"] == steps.count("C") for line in drifts)


def test_too_few_steps(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"at least 5 different distances .*, got 1; sample at least 10 steps"):
        fit(pictures, tmp_path / "x.json", steps=6, limit=1)
    assert not (tmp_path / "x.json").exists()
