import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vcd_fast.frozen_conv import freeze_convolutions, frozen_conv, frozen_convolutions, thaw_convolutions

CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CASES = [
    {},
    {"stride": (2,)},
    {"padding": (1,)},
    {"stride": (2,), "padding": (1,), "dilation": (2,)},
    {"groups": 2, "padding": (1,)},
]


def tensors(dimensions, dtype=torch.float32, groups=1, bias=True):
    generator = torch.Generator().manual_seed(dimensions)
    sizes = (9, 8, 7)[:dimensions]
    x = torch.randn(2, 4, *sizes, generator=generator).to(dtype)
    weight = torch.randn(6, 4 // groups, *(3,) * dimensions, generator=generator).to(dtype)
    return x, weight, torch.randn(6, generator=generator).to(dtype) if bias else None


def value_and_gradient(function, x, *args, **kwargs):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x, *args, **kwargs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torch_bit_for_bit(dimensions, options, dtype):
    x, weight, bias = tensors(dimensions, dtype, options.get("groups", 1))
    found = value_and_gradient(frozen_conv, x, weight, bias, **options)
    expected = value_and_gradient(CONVOLUTION[dimensions], x, weight, bias, **options)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "expanded", "sliced"])
def test_equals_torch_bit_for_bit_in_any_memory_layout(layout):
    x, weight, bias = tensors(2)
    x = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "permuted": lambda: x.transpose(2, 3),
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
        "sliced": lambda: x[:, :, ::2],
    }[layout]()
    leaf = x.detach().requires_grad_()
    results = []
    for function in (frozen_conv, F.conv2d):
        y = function(leaf, weight, bias, padding=(1,))
        results.append((y, torch.autograd.grad(y.square().sum(), leaf)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_without_bias():
    x, weight, _ = tensors(2, bias=False)
    for found, expected in zip(
        value_and_gradient(frozen_conv, x, weight), value_and_gradient(F.conv2d, x, weight), strict=True
    ):
        assert torch.equal(found, expected)


def test_gradient_in_double_precision():
    x, weight, bias = tensors(2, torch.float64)
    x = x[:1, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_conv(x, weight, bias, padding=(1,)), x)


def test_input_s_stand_in_is_never_read():
    """Under deterministic algorithms PyTorch fills what it allocates with NaN."""
    x, weight, bias = tensors(3)
    expected = value_and_gradient(F.conv3d, x, weight, bias)[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(value_and_gradient(frozen_conv, x, weight, bias)[1], expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_keeps_the_weight_only():
    kept = []
    x, weight, bias = tensors(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        frozen_conv(x.requires_grad_(), weight, bias)
    assert kept == [weight.data_ptr()]


def test_second_derivatives_are_refused():
    x, weight, bias = tensors(2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(frozen_conv(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_weights_that_want_a_gradient_are_refused_by_the_function_and_trained_in_a_module():
    x, weight, bias = tensors(2)
    with pytest.raises(ValueError, match=r"weight: expected frozen weights"):
        frozen_conv(x, weight.requires_grad_(), bias)
    module = nn.Conv2d(4, 6, 3)
    freeze_convolutions(module)
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert module.bias.grad is not None


def test_under_autocast_it_computes_as_torch_does():
    x, weight, bias = tensors(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(frozen_conv, x, weight, bias)
        expected = value_and_gradient(F.conv2d, x, weight, bias)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    assert found[1].dtype == expected[1].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


class Network(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv3d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv3d(6, 4, 3, padding=(0, 1, 1), stride=2))
        self.requires_grad_(False)


def test_a_network_with_frozen_convolutions_is_the_same_network():
    plain, frozen = Network(), Network()
    assert freeze_convolutions(frozen) == 2
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    x = tensors(3)[0]
    expected = value_and_gradient(plain, x)
    for network in (frozen, copy.deepcopy(frozen)):
        for a, b in zip(value_and_gradient(network, x), expected, strict=True):
            assert torch.equal(a, b)
    recomputed = value_and_gradient(lambda x: checkpoint(frozen, x, use_reentrant=False), x)
    assert torch.equal(recomputed[1], expected[1])


def saved(network, x):
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        network(x.clone().requires_grad_())
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_only_the_given_modules_change_and_can_be_changed_back():
    x = tensors(3)[0]
    network, other = Network(), Network()
    before = saved(network, x)
    freeze_convolutions(network)
    after = saved(network, x)
    assert after == 6 * x[:, :1].nbytes  # what SiLU keeps; the convolutions keep nothing
    assert before > after
    assert saved(other, x) == before
    thaw_convolutions(network)
    assert saved(network, x) == before
    with frozen_convolutions(network):
        assert saved(network, x) == after
    assert saved(network, x) == before
    freeze_convolutions(network)
    with frozen_convolutions(network):
        pass
    assert saved(network, x) == after


def test_padding_modes_other_than_zeros_are_left_to_torch():
    torch.manual_seed(0)
    x = tensors(2)[0]
    for options in ({"padding_mode": "reflect"}, {"padding": "same", "padding_mode": "zeros"}):
        module = nn.Conv2d(4, 6, 3, **{"padding": 1, **options}).requires_grad_(False)
        expected = module(x)
        freeze_convolutions(module)
        assert torch.equal(module(x), expected)


def test_an_input_without_batch_dimension_is_left_to_torch():
    x = tensors(2)[0][0]
    module = nn.Conv2d(4, 6, 3).requires_grad_(False)
    expected = module(x)
    freeze_convolutions(module)
    assert torch.equal(module(x), expected)
