"""What is in memory while two ranks train at ZeRO-3 in bfloat16: half of the base, the LoRA in float32, no encoder."""

import pytest


@pytest.fixture(scope="module")
def found(two_ranks, small_pictures, tmp_path_factory):
    return two_ranks("resident_worker.py", str(tmp_path_factory.mktemp("resident")), str(small_pictures))


def test_no_encoder_is_resident(found):
    assert [step["encoders"] for step in found["steps"]] == [[], []]
    assert all(step["decoder"] for step in found["steps"])  # the search finds what is there


def test_the_base_is_sharded_between_steps(found):
    for step in found["steps"]:
        assert step["whole"] == []
        assert step["sharded"] > 50
        assert step["numbers"] / 2 <= step["here"] <= step["numbers"] / 2 + step["sharded"]  # padded where odd


def test_the_base_is_bfloat16_but_for_what_the_model_keeps_and_the_lora_float32(found):
    for step in found["steps"]:
        assert step["base dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert step["lora dtypes"] == ["torch.float32"]


def test_it_trains(found):
    assert found["summary"]["updates"] == 2
    assert found["summary"]["largest_lora_value"] > 0
