"""Every way to compare rows in half form, against the full lists sorted in float64."""

import math

import pytest
import torch

from vcd_fast.kernels import config
from vcd_fast.kernels.count import count_fwd
from vcd_fast.kernels.library_sort import sort_fwd
from vcd_fast.kernels.merge import merge_fwd
from vcd_fast.kernels.rows import rows_fwd

PLAIN, EVEN, ODD = 0, 1, 2
FORMS = [(PLAIN, 0), (EVEN, 1), (EVEN, 2), (EVEN, 4), (ODD, 1), (ODD, 2), (ODD, 4)]
SMALL_MERGE = config.MergeConfig(sort_block=16, sort_warps=1, merge_block=16, merge_warps=1)
WAYS = {
    "rows": (rows_fwd, None),
    "merge": (merge_fwd, SMALL_MERGE),
    "sort": (sort_fwd, config.SortConfig(32, 1)),
    "count": (count_fwd, config.CountConfig(10, 64, 1, 512, 4, SMALL_MERGE)),
    "count coarse": (count_fwd, config.CountConfig(4, 64, 1, 16, 4, SMALL_MERGE)),
}


def compare(way, rows, power=1, first_direction=0):
    function, chosen = WAYS[way]
    cost, sign = function(rows.v, *rows.fixed, power, first_direction, config=chosen)
    return cost.double(), sign[..., : rows.kept].double()


def assert_same(got, want, tolerance=1e-6):
    (cost, sign), (true_cost, gradient) = got, want
    torch.testing.assert_close(cost, true_cost, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(sign, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "singles"), FORMS)
def test_equals_the_full_lists(way, form, singles, random_rows, full_lists):
    rows = random_rows(45, singles, form, frames=1)
    assert_same(compare(way, rows), full_lists(rows))


@pytest.mark.parametrize("way", ["rows", "merge", "sort"])
@pytest.mark.parametrize(("form", "singles"), [(PLAIN, 0), (EVEN, 4), (ODD, 2)])
def test_squared_cost(way, form, singles, random_rows, full_lists):
    rows = random_rows(40, singles, form, frames=1)
    assert_same(compare(way, rows, power=2), full_lists(rows, power=2))


@pytest.mark.parametrize("way", ["rows", "merge", "sort", "count"])
@pytest.mark.parametrize(("form", "singles"), [(EVEN, 1), (ODD, 2)])
@pytest.mark.parametrize("m", [0, 1, 16, 66])
def test_any_length(way, form, singles, m, random_rows, full_lists):
    rows = random_rows(m, singles, form, frames=1, directions=1, seed=m)
    assert_same(compare(way, rows), full_lists(rows))


@pytest.mark.parametrize("way", ["rows", "merge", "sort", "count"])
def test_one_value(way, make_rows, full_lists):
    rows = make_rows(torch.tensor([[[0.5]]]), torch.tensor([[[-1.0]]]), 0, PLAIN)
    assert_same(compare(way, rows), full_lists(rows))


@pytest.mark.parametrize("way", ["rows", "merge", "sort", "count"])
def test_targets_frames_and_a_chunk_of_directions(way, random_rows, full_lists):
    rows = random_rows(20, 2, ODD, targets=2, frames=2, directions=3)
    want = full_lists(rows)
    chunk = rows._replace(v=rows.v[:, 1:].contiguous())
    assert_same(compare(way, chunk, first_direction=1), [part[:, 1:] for part in want])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "singles"), [(EVEN, 4), (ODD, 4)])
def test_single_values_anywhere(way, form, singles, make_rows, full_lists):
    """The mean of a picture is its own bin and far out; the others may fall among, between or beyond the pairs."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 4, 1, 20, generator=generator)
    for row, scale in enumerate((1e4, -0.01, 0.0, 3.0)):
        x[row, :, -singles:] *= scale
        y[row, :, -singles:] *= scale if row % 2 else -scale
    rows = make_rows(x, y, singles, form)
    cost, sign = compare(way, rows)
    true_cost, gradient = full_lists(rows)
    torch.testing.assert_close(cost, true_cost, rtol=1e-6, atol=1e-6)
    distinct = [0, 1, 3]  # in row 2 the single values are equal: any subgradient
    torch.testing.assert_close(sign[distinct], gradient[distinct])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "singles"), [(PLAIN, 0), (EVEN, 4), (ODD, 4)])
def test_equal_rows_cost_nothing(way, form, singles, random_rows, make_rows):
    y = torch.randn(1, 1, 40 + singles, generator=torch.Generator().manual_seed(1))
    if form == ODD:
        y[..., ::3] *= -1  # the magnitudes are what is compared
    rows = make_rows(y, y, singles, form)
    cost, sign = compare(way, rows)
    assert cost.abs().max() < 1e-5
    assert sign.abs().max() <= 2
    exact = cost == 0
    assert exact.all(), "a sum of differences that are all zero"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "singles"), [(PLAIN, 0), (EVEN, 4), (ODD, 4)])
def test_ties_give_a_subgradient_always_the_same(way, form, singles, make_rows, full_lists):
    """Values on a coarse grid: the cost is exact, and equal values share the signs of their ranks, a tie with the target any of them."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randint(-3, 4, (1, 1, 40 + singles), generator=generator) / 2 for _ in range(2))
    rows = make_rows(x, y, singles, form)
    cost, sign = compare(way, rows)
    torch.testing.assert_close(cost, full_lists(rows)[0], rtol=1e-6, atol=1e-6)
    again = compare(way, rows)
    assert torch.equal(again[1], sign)
    assert torch.equal(again[0], cost)
    if form == ODD:
        return
    sign = sign.cpu()
    copies = torch.full((40 + singles,), 2 if form == EVEN else 1)
    copies[40:] = 1
    ordered = x[0, 0].repeat_interleave(copies).sort().values
    difference = ordered - y[0, 0].repeat_interleave(copies).sort().values
    for value in ordered.unique():
        found = sign[x == value].sum()
        ranks = difference[ordered == value]
        assert (ranks > 0).sum() - (ranks <= 0).sum() <= found <= (ranks >= 0).sum() - (ranks < 0).sum()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "singles"), [(EVEN, 2), (ODD, 2)])
@pytest.mark.parametrize("where", ["pair", "single"])
def test_nan_in_nan_out(way, form, singles, where, random_rows):
    rows = random_rows(20, singles, form, frames=1)
    rows.v[0, 0, 7 if where == "pair" else 21] = math.nan
    cost, sign = compare(way, rows)
    assert cost[0, 0].isnan()
    assert cost[0, 1].isfinite()
    assert torch.isfinite(sign).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [PLAIN, EVEN])
def test_nan_of_the_target(way, form, make_rows):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 1, 2, 20, generator=generator)
    y[0, 0, 5] = math.nan
    cost, _ = compare(way, make_rows(x, y, 2 if form else 0, form))
    assert cost[0, 0].isnan()
    assert cost[0, 1].isfinite()


@pytest.mark.parametrize("way", WAYS)
def test_infinities_are_the_outermost_values(way, make_rows):
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, 1, 1, 40, generator=generator)
    x[..., 3], x[..., 9] = math.inf, -math.inf
    rows = make_rows(x, y, 0, PLAIN)
    cost, sign = compare(way, rows)
    assert torch.isinf(cost).all()
    assert sign[0, 0, 3] == 1
    assert sign[0, 0, 9] == -1
    assert torch.isfinite(sign).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [PLAIN, EVEN])
def test_negative_zero_is_zero(way, form, make_rows, full_lists):
    x = torch.tensor([[[-0.0, 0.0, 1.0, -1.0, 0.0, -0.0, 2.0, -2.0, 1e-30, -1e-30]]])
    y = torch.tensor([[[0.0, 0.5, 1.5, -1.5, -0.0, 0.25, 2.0, -2.5, 0.0, -1e-30]]])
    rows = make_rows(x, y, 2 if form else 0, form)
    torch.testing.assert_close(compare(way, rows)[0], full_lists(rows)[0])


@pytest.mark.parametrize("way", ["count", "count coarse"])
@pytest.mark.parametrize("form", [EVEN, ODD])
def test_counting_is_exact_where_the_distance_is_small(way, form, random_rows, full_lists):
    """Sums of values of order one cancel to a distance a hundred thousand times smaller."""
    rows = random_rows(40, 2, form, frames=1, directions=1, noise=0.0, shift=1e-5)
    assert_same(compare(way, rows), full_lists(rows), tolerance=1e-9)


@pytest.mark.parametrize("form", [EVEN, ODD])
def test_counting_values_beyond_the_targets_range(form, make_rows, full_lists):
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(2, 2, 1, 32, generator=generator)
    rows = make_rows(x * torch.tensor([1e6, 1e-6]).view(2, 1, 1), y, 2, form)
    assert_same(compare("count", rows), full_lists(rows))


def test_counting_against_a_target_of_zeros(make_rows, full_lists):
    x = torch.randn(1, 2, 33, generator=torch.Generator().manual_seed(7))
    rows = make_rows(x, torch.zeros(1, 2, 33), 1, EVEN)
    torch.testing.assert_close(compare("count", rows)[0], full_lists(rows)[0])


def test_the_largest_short_row_has_a_configuration():
    for m in (0, 1, 17, 4096):
        assert config.candidates("rows", m, "sm_90")[0].block >= m
    with pytest.raises(ValueError, match="a row of 4097 values is too long for one program"):
        config.candidates("rows", 4097, "sm_90")


def test_bad_arguments_are_named(random_rows):
    rows = random_rows(20, 2, EVEN)
    v, w, own, place, form = rows.v, *rows.fixed
    with pytest.raises(TypeError, match=r"v must be torch\.float32, got torch\.float64"):
        rows_fwd(v.double(), w, own, place, form)
    with pytest.raises(ValueError, match=r"v must be contiguous"):
        rows_fwd(v.transpose(0, 1), w, own, place, form)
    with pytest.raises(ValueError, match=r"own must be \[1, 2, any\], got \[1, 1, 2\]"):
        rows_fwd(v, w, own[:, :1].contiguous(), place, form)
    with pytest.raises(ValueError, match="form must be 0 with no single values"):
        rows_fwd(v, w, own, place, PLAIN)
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        merge_fwd(v, w, own, place, form, 3)
    with pytest.raises(ValueError, match="power must be 1 for counting"):
        count_fwd(v, w, own, place, form, 2)
    with pytest.raises(ValueError, match=r"directions 1\.\.3 are not among the target's 2"):
        rows_fwd(v, w, own, place, form, 1, 1)
    with pytest.raises(ValueError, match=r"samples must be a multiple of the 3 targets, got 2"):
        merge_fwd(v, *(t.repeat(3, 1, 1) for t in (w, own, place)), form)
    with pytest.raises(ValueError, match="got a pitch of 16"):
        rows_fwd(v[..., :16].contiguous(), w, own, place, form)
