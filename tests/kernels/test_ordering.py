"""Integer keys and bins order every float32, whatever it is."""

import math

import pytest
import torch
import triton
import triton.language as tl

from vcd_fast.kernels.ordering import bin_of, from_key, pack, to_key, word_low, word_value

SPECIAL = [
    -math.inf,
    -3.4e38,
    -1e5,
    -1.0,
    -1e-38,
    -1e-45,
    -0.0,
    0.0,
    1e-45,
    1e-38,
    1.0,
    1e5,
    3.4e38,
    math.inf,
    math.nan,
]


@triton.jit
def key_kernel(x_ptr, key_ptr, back_ptr, low_ptr, value_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    key = to_key(tl.load(x_ptr + o))
    tl.store(key_ptr + o, key)
    tl.store(back_ptr + o, from_key(key))
    word = pack(key, 2 * o + 1)
    tl.store(low_ptr + o, word_low(word))
    tl.store(value_ptr + o, word_value(word))


@triton.jit
def bin_kernel(x_ptr, bin_ptr, scale, LINEAR: tl.constexpr, LOG_BINS: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(bin_ptr + o, bin_of(tl.load(x_ptr + o), scale, LINEAR, LOG_BINS))


def spread(device, count=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-6, 7, (count,), generator=generator)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(device)


def test_keys_keep_the_order_and_can_be_undone(device):
    x = spread(device)
    key, low = (torch.empty(256, dtype=torch.int32, device=device) for _ in range(2))
    back, value = torch.empty_like(x), torch.empty_like(x)
    key_kernel[(1,)](x, key, back, low, value, N=256)
    for got in (back, value):
        assert torch.equal(got.view(torch.int32), x.view(torch.int32)), "bit for bit, NaN and -0 too"
    assert torch.equal(low, 2 * torch.arange(256, dtype=torch.int32, device=device) + 1)
    by_key, by_value = x[key.argsort()], x.sort().values
    torch.testing.assert_close(by_key, by_value, rtol=0, atol=0, equal_nan=True)
    assert key[6] < key[7], "-0 before 0"
    assert (key[14] > key[:14]).all(), "NaN behind infinity"


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in multiply"
)  # NumPy's, in the interpreter: part of what is tested
@pytest.mark.parametrize("log_bins", [4, 12, 16])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 977.0, 1e30])
def test_bins_never_decrease(linear, log_bins, scale, device):
    x = spread(device)
    if linear:
        x = x.abs()
    found = torch.empty(256, dtype=torch.int32, device=device)
    bin_kernel[(1,)](x, found, scale, LINEAR=linear, LOG_BINS=log_bins, N=256)
    assert found.min() >= 0
    assert found.max() < 1 << log_bins
    ordered = found[x.argsort()]  # NaN last
    assert (ordered.diff() >= 0).all()
    assert found[6] == found[7], "-0 and 0 are equal, so they share a bin"
    assert found[14] == found.max()


def test_bins_resolve_what_they_should(device):
    x = torch.linspace(0, 1, 256, device=device)
    found = torch.empty(256, dtype=torch.int32, device=device)
    bin_kernel[(1,)](x, found, 256.0, LINEAR=True, LOG_BINS=8, N=256)
    assert len(found.unique()) > 250
    bin_kernel[(1,)](x, found, 60000.0, LINEAR=False, LOG_BINS=16, N=256)
    assert len(found.unique()) > 250
