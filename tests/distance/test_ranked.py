"""Rows sorted and compared in NumPy and by machine code, against full lists sorted in float64."""

import importlib.util
import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcd_fast.distance.backends import compiled, ranked, rows

FORMS = ("even", "odd", "whole")


@pytest.fixture(params=[ranked, compiled], ids=lambda module: module.__name__.rsplit(".")[-1])
def way(request):
    return request.param


def full(values, singles, form):
    if form == "whole":
        return torch.cat([values, singles], -1)
    return torch.cat([values, -values if form == "odd" else values, singles], -1)


def compare(way, values, singles, target, target_singles, form, p):
    """Rows against a target, both unsorted [r, m] and [r, S] -> sums [r], derivatives [r, m] and [r, S]."""
    target = np.sort(np.abs(target) if form == "odd" else target, -1)[None]
    target_singles = np.sort(target_singles, -1)[None]
    rows = np.concatenate([values, singles, np.full((len(values), 3), 7, np.float32)], -1)[None]
    total = np.full((1, len(values)), np.nan)
    way.compare(rows, target, target_singles, np.zeros(1, np.int64), 0, form, p, total, 0, len(values))
    assert (rows[..., -3:] == 7).all()
    return total[0], *np.split(rows[0, :, :-3], [values.shape[1]], -1)


def exact(values, singles, target, target_singles, form, p):
    """Sums of float64 full lists, with their gradients."""
    x, t, y, own = (torch.from_numpy(a).double() for a in (values, singles, target, target_singles))
    x.requires_grad_()
    t.requires_grad_()
    cost = (full(x, t, form).sort(-1).values - full(y, own, form).sort(-1).values).abs().pow(p).sum(-1)
    gradients = torch.autograd.grad(cost.sum(), (x, t), allow_unused=True)
    return cost.detach().numpy(), *(None if g is None else g.numpy() for g in gradients)


def draw(seed, kind, r, m, s, near=0.0):
    generator = np.random.default_rng(seed)

    def values(k):
        found = generator.standard_normal((r, k))
        if kind == "heavy":
            found = found**5
        if kind == "positive":
            found = np.exp(2 * found)
        return found.astype(np.float32)

    x, y = (values(m), values(s)), (values(m), values(s))
    if near:
        y = tuple((a * (1 + near * generator.standard_normal(a.shape))).astype(np.float32) for a in x)
    return *x, *y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("kind", "near"), [("normal", 0.0), ("normal", 1e-3), ("heavy", 0.3), ("positive", 0.0)])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (2, 0, 4), (3, 5, 4), (2, 700, 2), (1, 3000, 4), (3, 40, 0), (2, 90, 11)], ids=str
)
def test_sums_and_derivatives(way, form, p, kind, near, size):
    r, m, s = size
    sides = draw(r * m + s, kind, r, m, s, near)
    total, got, got_singles = compare(way, *sides, form, p)
    want, slopes, single_slopes = exact(*sides, form, p)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    if p == 1:
        np.testing.assert_array_equal(got, slopes)
        np.testing.assert_array_equal(got_singles, single_slopes)
    else:  # equal float32 values may be matched either way
        np.testing.assert_allclose(got.sum(), slopes.sum(), rtol=1e-4, atol=1e-3)
        wrong = np.abs(got - slopes) > 1e-4 * np.abs(slopes).max(initial=0)
        assert wrong.sum() <= 0.01 * wrong.size


numbers = st.integers(-3, 3).map(float) | st.sampled_from([-0.0, 0.5, 1e-30, -1e-30, 1e30, float("inf"), -float("inf")])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12),
    singles=st.lists(st.tuples(numbers, numbers), max_size=4),
)
@example(pairs=[(0.0, -0.0), (-0.0, 0.0)], singles=[(-0.0, 0.0), (0.0, -0.0)])
def test_ties_zeros_and_infinities(form, pairs, singles):
    """Costs are exact whatever is equal to what; derivatives are those of one of the possible orders, the same for both ways."""
    x, y = (np.array(side, np.float32)[None] for side in zip(*pairs, strict=True))
    t, own = (
        np.array(side, np.float32).reshape(1, -1) for side in (zip(*singles, strict=True) if singles else ((), ()))
    )
    want, _, _ = exact(x, t, y, own, form, 1)
    for way in (ranked, compiled):
        total, slopes, single_slopes = compare(way, x, t, y, own, form, 1)
        if not np.isfinite(want).all():
            assert not np.isfinite(total).any()
            continue
        scale = np.abs(full(*(torch.from_numpy(a).double() for a in (y, own)), form).numpy())
        np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-6 * scale[np.isfinite(scale)].sum())
        copies = 1 if form == "whole" else 2
        assert set(np.unique(slopes)) <= {float(i) for i in range(-copies, copies + 1)}
        assert set(np.unique(single_slopes)) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nan", [np.float32(np.nan), -np.float32(np.nan)], ids=["nan", "-nan"])
@pytest.mark.parametrize("where", range(4), ids=["values", "singles", "target", "target singles"])
def test_nan_ends_in_nan_in_its_row_alone(way, form, where, nan):
    sides = list(draw(0, "normal", 3, 200, 4))
    sides[where][1, 2] = nan
    total, _, _ = compare(way, *sides, form, 1)
    assert np.isnan(total).tolist() == [False, True, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1, 2])
def test_equal_rows_cost_nothing_and_have_no_slope(way, form, p):
    x, t, _, _ = draw(0, "heavy", 2, 900, 4)
    for found in compare(way, x, t, x, t, form, p):
        assert not found.any()


def test_rows_go_with_their_own_sample_and_direction_and_others_are_left_alone(way):
    """Three samples of two targets, directions 2 to 4 of five; only the middle of the nine rows is asked for."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((3, 3, 53)).astype(np.float32)
    target = np.sort(generator.standard_normal((2, 5, 50)).astype(np.float32), -1)
    singles = np.sort(generator.standard_normal((2, 5, 3)).astype(np.float32), -1)
    got, total, owners = rows.copy(), np.zeros((3, 3)), np.array([0, 0, 1])
    way.compare(got, target, singles, owners, 2, "even", 1, total, 2, 8)
    for row in range(9):
        g, k = divmod(row, 3)
        if 2 <= row < 8:
            own = (a[owners[g], 2 + k][None] for a in (target, singles))
            want, slopes, _ = compare(way, rows[g, k, None, :50], rows[g, k, None, 50:], *own, "even", 1)
            assert total[g, k] == want[0]
            np.testing.assert_array_equal(got[g, k, :50], slopes[0])
        else:
            assert total[g, k] == 0
            np.testing.assert_array_equal(got[g, k], rows[g, k])


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=7, max_size=7), min_size=1, max_size=4))
def test_sorting(values):
    values = np.array(values, np.float32)
    for way in (ranked, compiled):
        ordered = np.full_like(values, 7)
        way.sort(values, ordered, 0, len(values) - 1)
        np.testing.assert_array_equal(ordered[:-1], np.sort(values[:-1], -1))
        assert (ordered[-1] == 7).all()


def test_without_numba_numpy_does_it_and_the_log_says_so(monkeypatch, caplog):
    assert rows.implementation() is compiled
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, compiled.__name__)
    monkeypatch.delattr("vcd_fast.distance.backends.compiled")
    with caplog.at_level(logging.INFO, "vcd_fast"):
        assert rows.implementation.__wrapped__() is ranked
    assert "numba cannot be imported" in caplog.text


def test_where_nothing_can_be_written_nothing_is_kept(monkeypatch):
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    spec = importlib.util.spec_from_file_location("compiled_anew", compiled.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._pairs_up_to(np.float32(0), np.arange(3, dtype=np.float32), 1) == 2
