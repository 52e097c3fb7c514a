"""All ranks go on from the same checkpoint, or none does."""

import pytest
import torch
import torch.distributed as dist

from vcd_fast.training import checkpoint as checkpoints
from vcd_fast.training import resume
from vcd_fast.training.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def ranks(monkeypatch):
    """ranks(step): the other rank stands at `step`, None without a checkpoint."""

    def arrange(step, rank=0):
        def all_reduce(values, op):
            assert op == dist.ReduceOp.MAX
            other = -1 if step is None else step
            values.copy_(torch.maximum(values, torch.tensor([other, -other])))

        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "barrier", lambda: None)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)

    return arrange


def save(folder, step):
    return checkpoints.save(folder, Checkpoint(step, step, {"a": torch.zeros(2)}, {}, {}), keep=3)


def test_the_same_everywhere(tmp_path, ranks):
    ranks(None)
    assert resume.choose(tmp_path, "auto", CPU) is None
    save(tmp_path, 20)
    ranks(20)
    assert resume.choose(tmp_path, "auto", CPU).step == 20


@pytest.mark.parametrize(
    ("other", "said"), [(None, "step 20 and others none"), (10, "that of step 10"), (40, "step 40")]
)
def test_a_folder_that_is_not_shared_is_refused(tmp_path, ranks, other, said):
    save(tmp_path, 20)
    ranks(other)
    with pytest.raises(ValueError, match=f"output: expected a folder that all processes share.*{said}"):
        resume.choose(tmp_path, "auto", CPU)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_puts_back_what_was_put_aside(tmp_path, ranks, rank):
    folder = save(tmp_path, 20)
    folder.rename(folder.with_name(f".{folder.name}.replaced"))
    ranks(20 if rank == 0 else None, rank=rank)
    found = resume.choose(tmp_path, "auto", CPU)
    assert (found is not None) == (rank == 0)
