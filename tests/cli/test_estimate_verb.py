"""`vcd estimate` as a user meets it."""

import json

import pytest

from vcd_fast.cli.estimate import read_options


def test_a_table_advice_and_json(vcd, tmp_path):
    words = ["--model", "wan", "--preset", "tiny", "--frames", "13", "--size", "64x48", "--gpus", "2", "--zero", "2"]
    code, out, err = vcd("estimate", *words, "--json", tmp_path / "estimate.json")
    assert code == 0, err
    assert out.startswith(
        "wan, 13 frames of 64x48, last:1, checkpointing block: peak memory in GiB on each of 2 GPUs, ZeRO 2"
    )
    for line in ("phase", "encode", "rollout", "decode", "reward", "backward", "optimizer", "samples", " 12 GB  fits"):
        assert f"\n{line}" in out
    found = json.loads((tmp_path / "estimate.json").read_text())
    assert found["config"]["model"]["num_frames"] == 13
    assert [budget["gb"] for budget in found["budgets"]] == [12, 16, 24, 48, 80]
    assert found["needed_bytes"] == max(phase["needed_bytes"] for phase in found["phases"].values())
    assert {"torch", "diffusers"} <= set(found["versions"])


def test_options_are_those_of_a_run():
    config, arguments = read_options(["--model", "opensora", "--backprop", "last:3", "--gpus", "4"])
    assert (config.preset, config.rollout.backprop, arguments.gpus) == ("240p", "last:3", 4)
    config, _ = read_options(["--model=wan", "--preset=tiny", "--size=96x64", "--num-frames=5"])
    assert (config.preset, config.model.width, config.model.height, config.model.num_frames) == ("tiny", 96, 64, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "wan", "--size", "368"], "size: expected WIDTHxHEIGHT in pixels, for example 368x272, got '368'"),
        (["--model", "wan", "--frames", "24"], "4n \\+ 1 frames, got 24"),
        (["--model", "wan", "--fraems", "25"], "unknown option --fraems; did you mean --frames"),
        (["--gpus", "2"], "model: expected --model with one of wan, opensora, got none"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        read_options(words)
