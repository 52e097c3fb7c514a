import subprocess
import sys

import pytest
import torch

from vcd_fast.distance.projections import draw_projections, given_projections


def test_directions_have_unit_norm_and_no_preference():
    drawn = draw_projections(0, "relu1_1", 4096, 8)
    assert drawn.shape == (4096, 8)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4096, dtype=torch.float64))
    assert drawn.mean(0).abs().max() < 0.02
    torch.testing.assert_close(drawn.T @ drawn / 4096, torch.eye(8, dtype=torch.float64) / 8, atol=0.01, rtol=0)


def test_seed_and_layer_alone_decide():
    first = draw_projections(3, "relu1_1", 4, 5)
    torch.manual_seed(99)
    assert torch.equal(first, draw_projections(3, "relu1_1", 4, 5))
    assert not torch.equal(first, draw_projections(4, "relu1_1", 4, 5))
    assert not torch.equal(first, draw_projections(3, "relu2_1", 4, 5))


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw_projections(0, "x", 4, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_another_process_draws_the_same():
    code = (
        "from vcd_fast.distance.projections import *; print(draw_projections(-7, 'relu', 2, 3, 2).sum().item().hex())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float.fromhex(result.stdout.strip()) == draw_projections(-7, "relu", 2, 3, 2).sum().item()


def test_given_directions_are_taken_as_they_are():
    values = torch.randn(4, 3)
    assert torch.equal(given_projections(values, 3, None, "projections"), values)
    assert torch.equal(given_projections(values[..., None, None], 3, None, "projections"), values)
    patches = torch.randn(4, 3, 2, 2)
    assert torch.equal(given_projections(patches, 3, 2, "projections"), patches.flatten(1))


@pytest.mark.parametrize(
    ("projections", "patch", "error", "message"),
    [
        ([[1.0]], None, TypeError, "expected a floating-point tensor"),
        (torch.ones(2, 3, dtype=torch.int64), None, TypeError, "expected a floating-point tensor"),
        (torch.ones(2, 4), None, ValueError, r"expected shape \[K, 3, 1, 1\] or \[K, 3\], got \[2, 4\]"),
        (torch.ones(3), None, ValueError, "expected shape"),
        (torch.ones(0, 3), None, ValueError, "expected shape"),
        (torch.ones(2, 3, 2, 2), None, ValueError, "expected shape"),
        (torch.ones(2, 3), 2, ValueError, r"expected shape \[K, 3, 2, 2\], got \[2, 3\]"),
    ],
    ids=["list", "int", "channels", "ndim", "none", "patch", "flat"],
)
def test_bad_directions_are_named(projections, patch, error, message):
    with pytest.raises(error, match=message):
        given_projections(projections, 3, patch, "projections")
