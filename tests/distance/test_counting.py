"""Rows compared by counting and by sorting, against full lists sorted in float64."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcd_fast.distance.backends import binning
from vcd_fast.distance.backends.binning import Key, TargetBins, Workspace
from vcd_fast.distance.backends.counting import compare
from vcd_fast.distance.backends.ranked import Rows, float_order, from_order

FORMS = ("even", "odd", "whole")


def full(values, singles, form):
    if form == "whole":
        return torch.cat([values, singles], -1)
    return torch.cat([values, -values if form == "odd" else values, singles], -1)


def places(target, singles, form):
    target, singles = torch.from_numpy(target), torch.from_numpy(singles)
    at_most = torch.searchsorted(target, singles, right=True)
    pairs = 2 * at_most
    if form == "odd":
        pairs = target.shape[-1] + at_most - torch.searchsorted(target, -singles).masked_fill_(singles.isnan(), 0)
    return (pairs + torch.arange(singles.shape[-1])).numpy()


def block(values, singles, target, target_singles, form, p):
    """A block of rows against a target, both unsorted [r, m] and [r, S]."""
    target = np.sort(np.abs(target) if form == "odd" else target, -1)
    target_singles = np.sort(target_singles, -1)
    bins = TargetBins.of(torch.from_numpy(target)[None], form) if p == 1 else None
    counted = () if bins is None else (bins.key, *(tensor[0].numpy() for tensor in bins.tensors()))
    at = places(target, target_singles, form)
    return Rows(values.copy(), singles.copy(), target, target_singles, at, form, p, *(counted or (None,)))


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


@pytest.fixture(params=["counted", "sorted"])
def short_row(request, monkeypatch):
    monkeypatch.setattr(binning, "SHORT_ROW", 0 if request.param == "counted" else 1 << 30)


@pytest.mark.usefixtures("short_row")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
@pytest.mark.parametrize("near", [0.0, 0.3, 1e-3])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (3, 5, 4), (2, 700, 4), (1, 3000, 4), (2, 1500, 2), (3, 40, 0), (2, 90, 11)], ids=str
)
def test_sums_and_derivatives(form, p, kind, near, size):
    r, m, s = size
    sides = draw(r * m + s, kind, r, m, 0 if form == "whole" else s, near)
    rows = block(*sides, form, p)
    total = compare(rows, Workspace())
    want, slopes, single_slopes = exact(*sides, form, p)
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, want, rtol=1e-6)
    if p == 1:
        np.testing.assert_array_equal(rows.values, slopes)
        if s and form != "whole":
            np.testing.assert_array_equal(rows.singles, single_slopes)
    else:  # equal float32 values may be matched either way
        np.testing.assert_allclose(rows.values.sum(), slopes.sum(), rtol=1e-4, atol=1e-3)
        assert np.mean(np.abs(rows.values - slopes) > 1e-4 * np.abs(slopes).max()) < 0.01


numbers = st.integers(-3, 3).map(float) | st.sampled_from([-0.0, 0.5, 1e-30, -1e-30, 1e30, float("inf"), -float("inf")])


@pytest.mark.usefixtures("short_row")
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12),
    singles=st.lists(st.tuples(numbers, numbers), max_size=4),
)
@example(pairs=[(0.0, -0.0), (-0.0, 0.0)], singles=[(-0.0, 0.0), (0.0, -0.0)])
def test_ties_zeros_and_infinities(form, pairs, singles):
    """Costs are exact whatever is equal to what; derivatives are a subgradient: along ±1 they bound the one-sided slopes."""
    x, y = (np.array(side, np.float32)[None] for side in zip(*pairs, strict=True))
    t, own = (
        np.array(side, np.float32).reshape(1, -1) for side in (zip(*singles, strict=True) if singles else ((), ()))
    )
    if form == "whole":
        t, own = t[:, :0], own[:, :0]
    with np.errstate(invalid="ignore", over="ignore"):
        rows = block(x, t, y, own, form, 1)
        total = compare(rows, Workspace())
    want, _, _ = exact(x, t, y, own, form, 1)
    if np.isfinite(want).all():
        scale = np.abs(full(*(torch.from_numpy(a).double() for a in (y, own)), form).numpy())
        scale = scale[np.isfinite(scale)].sum()
        np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-6 * scale)
    else:
        assert not np.isfinite(total).any()
    if not np.isfinite(want).all():
        return
    copies = 1 if form == "whole" else 2
    assert set(np.unique(rows.values)) <= {float(i) for i in range(-copies, copies + 1)}
    assert set(np.unique(rows.singles)) <= {-1.0, 0.0, 1.0}


@pytest.mark.usefixtures("short_row")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["values", "singles", "target", "target singles"])
def test_nan_ends_in_nan_in_its_row_alone(form, where):
    sides = list(draw(0, "normal", 3, 200, 4))
    if form == "whole":
        sides[1], sides[3] = sides[1][:, :0], sides[3][:, :0]
        where = where.replace("target singles", "target").replace("singles", "values")
    index = ["values", "singles", "target", "target singles"].index(where)
    sides[index][1, 2] = np.nan
    with np.errstate(invalid="ignore"):
        total = compare(block(*sides, form, 1), Workspace())
    assert np.isnan(total).tolist() == [False, True, False]


@pytest.mark.usefixtures("short_row")
@pytest.mark.parametrize("form", FORMS)
def test_equal_rows_cost_nothing_and_have_no_slope(form):
    x, t, _, _ = draw(0, "heavy", 2, 900, 0 if form == "whole" else 4)
    rows = block(x, t, x, t, form, 1)
    assert not compare(rows, Workspace()).any()
    assert not rows.values.any()
    assert not rows.singles.any()


def test_a_workspace_leaks_nothing_between_blocks(monkeypatch):
    monkeypatch.setattr(binning, "SHORT_ROW", 0)
    workspace = Workspace()
    sizes = [("even", 3, 50), ("odd", 1, 700), ("even", 1, 2000), ("odd", 4, 60), ("whole", 2, 300), ("even", 3, 50)]
    for seed, (form, r, m) in enumerate(sizes):
        sides = draw(seed, "normal", r, m, 0 if form == "whole" else 4)
        fresh, used = block(*sides, form, 1), block(*sides, form, 1)
        np.testing.assert_array_equal(compare(fresh, Workspace()), compare(used, workspace))
        np.testing.assert_array_equal(fresh.values, used.values)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_float_order_sorts_like_floats_and_comes_back(values):
    values = np.array(values, np.float32)
    order = float_order(values)
    np.testing.assert_array_equal(from_order(order).view(np.int32), values.view(np.int32))
    numbers = ~np.isnan(values)
    found = values[numbers][np.argsort(order[numbers], kind="stable")]
    assert (found[1:] >= found[:-1]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
def test_keys_are_monotone_and_in_range(form, kind):
    _, _, target, _ = draw(1, kind, 3, 3000, 0)
    target = np.sort(np.abs(target) if form == "odd" else target, -1)
    key = Key.of_rows(form, 3000)
    scale = key.scale(target)
    values = (
        np.concatenate([target * 1.7, target, -target], -1)
        if form != "odd"
        else np.concatenate([target * 1.7, target], -1)
    )
    values = np.sort(values, -1)
    indices = key.indices(values, scale, Workspace(), "indices")
    bins = indices - np.arange(3)[:, None] * (key.bins + 1) - 1
    assert (np.diff(bins, axis=-1) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < key.bins
    assert len(np.unique(bins)) > 200


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
@pytest.mark.parametrize("form", FORMS)
def test_keys_of_extreme_rows(form, value):
    target = np.full((1, 50), value, np.float32)
    key = Key.of_rows(form, 50)
    wide = np.array([[0.0, 1e-38, 1.0, 3e38, np.inf, np.nan]], np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        indices = key.indices(wide, key.scale(target), Workspace(), "indices")
    assert ((indices >= 1) & (indices <= key.bins)).all()
