import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcd_fast import sliced_wasserstein, sort_target
from vcd_fast.distance.backends.reference import every_value, every_value_sorted
from vcd_fast.distance.lists import Lists, projected_lists


def maps(*shape, seed=0, dtype=torch.float32):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (3, 4), (7, 5), (6, 9)], ids=str)
@pytest.mark.parametrize("slicing", ["channel", "flat", "patch"])
def test_half_form_holds_the_full_sorted_lists(shape, slicing):
    y = maps(2, 3, *shape)
    target = sort_target(y, num_projections=6, slicing=slicing, patch_size=1)
    lists = projected_lists(y, target.config, target.projections)
    for part, unsorted in zip(target.parts, lists, strict=True):
        torch.testing.assert_close(
            every_value_sorted(part), every_value(unsorted).sort(-1).values, rtol=1e-6, atol=1e-6
        )


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.integers(0, 4), max_size=9),
    alone=st.lists(st.integers(-4, 4), max_size=4),
    odd=st.booleans(),
)
def test_merging_is_sorting_ties_or_not(pairs, alone, odd):
    """Small integers tie all the time."""
    pairs = torch.tensor(sorted(pairs), dtype=torch.float32)[None, None]
    alone = torch.tensor(sorted(alone), dtype=torch.float32)[None, None]
    got = every_value_sorted(Lists(pairs, alone, "odd" if odd else "even"))
    want = torch.cat([pairs, -pairs if odd else pairs, alone], -1).sort(-1).values
    assert torch.equal(got, want)


def test_half_form_takes_half_the_memory():
    target = sort_target(maps(1, 3, 40, 30), num_projections=8)
    values = sum(part.representatives.numel() + part.self_conjugate.numel() for part in target.parts)
    assert values == 2 * 8 * (40 * 30 - 4) // 2 + 2 * 8 * 4
    assert target.nbytes == 4 * (values + 8 * 3)


def test_one_target_serves_many_maps():
    y, x = maps(1, 3, 6, 5), maps(4, 3, 6, 5, seed=2)
    target = sort_target(y, num_projections=6, seed=3, p=2, amplitude_weight=0.5, layer="relu")
    want = sliced_wasserstein(x, y, num_projections=6, seed=3, p=2, amplitude_weight=0.5, layer="relu")
    torch.testing.assert_close(sliced_wasserstein(x, target), want)
    assert target.config.p == 2


def test_selecting_samples_of_a_target():
    y, x = maps(3, 3, 6, 5), maps(3, 3, 6, 5, seed=2)
    target = sort_target(y, num_projections=6)
    torch.testing.assert_close(sliced_wasserstein(x[1:], target[1:]), sliced_wasserstein(x, target)[1:])
    assert (target.batch_size, target[1:].batch_size, target.shape) == (3, 2, (3, 6, 5))


def test_a_target_does_not_follow_its_maps():
    y = maps(1, 3, 6, 5)
    target = sort_target(y, num_projections=4, domain="feature", slicing="flat")
    before = target.parts[0].representatives.clone()
    y.zero_()
    assert torch.equal(target.parts[0].representatives, before)


def test_float64_stays_and_half_precision_becomes_float32():
    y = maps(1, 3, 6, 5, dtype=torch.float64)
    assert sort_target(y).dtype == torch.float64
    assert sort_target(y.bfloat16()).dtype == torch.float32


def test_drawn_directions_are_those_of_the_layer():
    y = maps(1, 3, 6, 5)
    one, two = sort_target(y, layer="one"), sort_target(y, layer="two")
    assert not torch.equal(one.projections, two.projections)
    assert torch.equal(one.projections, sort_target(y, layer="one").projections)


def test_given_directions_set_their_number():
    assert sort_target(maps(1, 3, 6, 5), torch.randn(11, 3)).config.num_projections == 11


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda y: sort_target([1.0]), TypeError, "y: expected a tensor, got list"),
        (lambda y: sort_target(y.int()), TypeError, "y: expected floating-point numbers, got torch.int32"),
        (
            lambda y: sort_target(y[0]),
            ValueError,
            r"y: expected shape \[batch, channels, height, width\], got \[3, 6, 5\]",
        ),
        (lambda y: sort_target(y[:0]), ValueError, "y: expected shape"),
        (lambda y: sort_target(y, slicing="patch"), ValueError, "at least 5×5 for patches of that size, got 6×4"),
        (
            lambda y: sort_target(y, torch.ones(2, 3), slicing="flat"),
            ValueError,
            "projections: expected None in the flat",
        ),
        (lambda y: sort_target(y, k=3), TypeError, "unknown option: expected one of domain, .*, got k"),
        (lambda y: sort_target(y, p=4), ValueError, "p: expected 1 or 2"),
        (lambda y: sliced_wasserstein(y, sort_target(y), p=2), TypeError, "carries directions and options"),
        (
            lambda y: sliced_wasserstein(y, sort_target(y), torch.ones(2, 3)),
            TypeError,
            "carries directions and options",
        ),
        (
            lambda y: sliced_wasserstein(y[:, :2], sort_target(y)),
            ValueError,
            r"x: expected the target's .* \[3, 6, 4\], got \[2, 6, 4\]",
        ),
        (lambda y: sliced_wasserstein(y, y[..., :3]), ValueError, "x: expected the target's"),
        (lambda y: sliced_wasserstein(y[:1], y), ValueError, "y: expected batch size 1 or that of x, 1, got 2"),
        (
            lambda y: sliced_wasserstein(y, y.clone().requires_grad_()),
            ValueError,
            "y: expected a tensor that needs no gradient",
        ),
        (
            lambda y: sliced_wasserstein(y, y, backend="cuda"),
            ValueError,
            "backend: expected one of auto, reference, simd, triton",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    y = maps(2, 3, 6, 5)
    with pytest.raises(error, match=message):
        call(y[..., :4] if "6×4" in message or "6, 4" in message else y)


def test_backend_from_the_environment(monkeypatch):
    y = maps(1, 3, 6, 5)
    monkeypatch.setenv("VCD_FAST_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match=r"environment variable VCD_FAST_BACKEND: expected one of auto, .*got 'fastest'"
    ):
        sliced_wasserstein(y, y)
    sliced_wasserstein(y, y, backend="reference")
