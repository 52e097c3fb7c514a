import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from vcd_fast.models.base import FAMILIES, BaseModelSettings, Condition, Schedule, State, Step, family


@dataclasses.dataclass(frozen=True)
class Example(Condition):
    text: torch.Tensor
    ids: torch.Tensor
    image: torch.Tensor | None = None


def example(value, image=False):
    text = torch.full((1, 3), float(value))
    return Example(text, torch.full((1, 2), value), torch.full((1, 1), float(value)) if image else None)


def test_collate_and_split_are_inverse():
    items = [example(1), example(2), example(3)]
    batch = Example.collate(items)
    assert batch.batch_size == 3
    assert batch.text[:, 0].tolist() == [1, 2, 3]
    assert batch.image is None
    for item, again in zip(items, batch.split(), strict=True):
        assert torch.equal(item.text, again.text)
        assert again.image is None
    assert Example.collate([example(1, image=True)]).image.tolist() == [[1.0]]


def test_collate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="items: expected at least one condition, got none"):
        Example.collate([])
    with pytest.raises(ValueError, match="items: expected equal shapes of image, got"):
        Example.collate([example(1), example(2, image=True)])
    longer = dataclasses.replace(example(1), text=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"equal shapes of text, got \['\(3,\)', '\(4,\)'\]"):
        Example.collate([example(1), longer])


def test_to_casts_floating_point_only():
    moved = example(1).to(dtype=torch.bfloat16)
    assert moved.text.dtype == torch.bfloat16
    assert moved.ids.dtype == torch.int64
    assert example(1).to("meta").ids.device.type == "meta"


@pytest.mark.parametrize("image", [False, True])
def test_save_and_load(tmp_path, image):
    path = tmp_path / "condition.safetensors"
    example(4, image).save(path)
    read = Example.load(path)
    assert torch.equal(read.text, example(4).text)
    assert torch.equal(read.ids, example(4).ids)
    assert (read.image is None) == (not image)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"text": torch.zeros(1), "weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"expected the tensors of a Example, got \['text', 'weight'\]"):
        Example.load(tmp_path / "other.safetensors")


def test_schedule_is_a_sequence_of_steps():
    steps = tuple(Step(i, 1000.0 - i, 1.0 - i / 2, -0.5) for i in range(2))
    schedule = Schedule(steps)
    assert len(schedule) == 2
    assert list(schedule) == list(steps)
    assert schedule[-1].sigma == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        State(torch.zeros(1)).latents = torch.ones(1)


def test_families():
    with pytest.raises(ValueError, match="model: expected one of wan, opensora, got 'sora'"):
        family("sora")
    assert set(FAMILIES) == {"wan", "opensora"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_offers_the_same(name):
    package = family(name)
    for function in (package.load_encoder, package.load_model, package.load_meta, package.missing_weights):
        assert callable(function)
    assert issubclass(package.ModelSettings, BaseModelSettings)
    assert "default" in package.LORA_TARGETS
    assert package.DEFAULT_PRESET != "tiny"
    assert not hasattr(package, "something_else")
