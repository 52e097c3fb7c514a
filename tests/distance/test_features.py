import copy

import pytest
import torch
from torch.nn import functional as F

from vcd_fast import VGG19Features
from vcd_fast.distance.config import FDL_LAYERS

# torchvision.models.vgg19().features: indices of the convolutions, by block
CONVOLUTIONS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14, 16), 4: (19, 21, 23, 25), 5: (28, 30, 32, 34)}
SHAPES = {1: (64, 1), 2: (128, 2), 3: (256, 4), 4: (512, 8), 5: (512, 16)}


def test_parameters_have_torchvisions_names(vgg):
    kept = [i for block in CONVOLUTIONS.values() for i in block if i <= 28]
    assert list(vgg.state_dict()) == [f"features.{i}.{kind}" for i in kept for kind in ("weight", "bias")]
    assert sum(p.numel() for p in vgg.parameters()) == 12_944_960
    assert not any(p.requires_grad for p in vgg.parameters())


def test_taps_and_their_shapes(vgg):
    found = vgg(torch.rand(2, 3, 35, 50))
    want = {f"relu{b}_1": (2, channels, 35 // stride, 50 // stride) for b, (channels, stride) in SHAPES.items()}
    assert {name: tuple(x.shape) for name, x in found.items()} == want
    assert all((x >= 0).all() for x in found.values())


def test_values_are_those_of_the_definition():
    """Written out from the weights alone, taps in front of the pools as well."""
    with pytest.warns(UserWarning, match="random weights"):
        vgg = VGG19Features("random", layers=FDL_LAYERS)
    images = torch.rand(1, 3, 32, 48)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    state, found = vgg.state_dict(), vgg(images)
    for block, indices in CONVOLUTIONS.items():
        for i in indices:
            x = F.relu(F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
        torch.testing.assert_close(found[FDL_LAYERS[block - 1]], x)
        x = F.max_pool2d(x, 2)
    assert len(found) == 5


def test_depth_follows_the_layers():
    with pytest.warns(UserWarning, match="random weights"):
        vgg = VGG19Features("random", layers=("relu2_1", "relu1_2"))
    assert vgg.minimum_size == 2
    assert list(vgg(torch.rand(1, 3, 2, 2))) == ["relu1_2", "relu2_1"]
    with pytest.raises(ValueError, match="layers: expected names from relu1_1 to relu5_4, got conv1_1"):
        VGG19Features("random", layers=("conv1_1",))


def test_least_image(vgg):
    assert vgg.minimum_size == 16
    assert vgg(torch.rand(1, 3, 16, 16))["relu5_1"].shape == (1, 512, 1, 1)


def test_convolutions_keep_no_input(vgg):
    """Its graph holds the outputs of the ReLUs, the indices of the pools and the weights, nothing else and nothing twice."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        found = vgg(torch.rand(2, 3, 32, 48, requires_grad=True))
    weights = {p.untyped_storage().data_ptr() for p in vgg.parameters()}
    values = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    maps = [(64, 2, 1), (128, 2, 2), (256, 4, 4), (512, 4, 8), (512, 1, 16)]
    outputs = sum(4 * 2 * channels * count * (32 // stride) * (48 // stride) for channels, count, stride in maps)
    pools = sum(8 * 2 * channels * (32 // stride // 2) * (48 // stride // 2) for channels, _, stride in maps[:4])
    statistics = 2 * 3 * 4
    assert values <= outputs + pools + statistics
    assert found["relu5_1"].requires_grad


def test_no_graph_without_a_gradient_to_compute(vgg):
    assert not any(x.requires_grad for x in vgg(torch.rand(1, 3, 16, 16)).values())
    assert all(x.requires_grad for x in vgg(torch.rand(1, 3, 16, 16, requires_grad=True)).values())


def test_normalisation_is_exact_after_a_change_of_dtype(vgg):
    other = copy.deepcopy(vgg).to(torch.bfloat16).to(torch.float64)
    mean, std = other._mean_and_std(torch.zeros(1, dtype=torch.float64))
    assert mean.flatten().tolist() == [0.485, 0.456, 0.406]
    assert std.flatten().tolist() == [0.229, 0.224, 0.225]


def test_random_weights_are_always_the_same(vgg):
    with pytest.warns(UserWarning, match="its distances are not the published ones"):
        other = VGG19Features("random")
    assert all(torch.equal(a, b) for a, b in zip(vgg.parameters(), other.parameters(), strict=True))
    assert other.weight_file == vgg.weight_file
    assert (other.weight_file.source, len(other.weight_file.sha256)) == ("random", 64)
