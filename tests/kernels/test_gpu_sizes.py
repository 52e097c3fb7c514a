"""Real sizes, on a GPU: the layers of VGG19 for a 272×368 frame, rows behind 2**31 elements, no host sync, CUDA graphs, memory."""

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vcd_fast import VCDLoss, VGG19Features, sliced_wasserstein
from vcd_fast.distance.backends import reference, triton_fused
from vcd_fast.distance.backends.triton_fused import sliced_terms
from vcd_fast.distance.config import VCD_LAYERS
from vcd_fast.distance.target import sort_target

pytestmark = pytest.mark.gpu

LAYERS = [(64, 272, 368), (128, 136, 184), (256, 68, 92), (512, 34, 46), (512, 17, 23)]
METHODS = ["rows", "merge", "count", "sort"]
GIB = 2**30
GOLDENS = Path(__file__).parents[1] / "goldens" / "distance"


def needs(gibibytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free / GIB:.0f} are free")


@pytest.fixture(autouse=True)
def _free_memory():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def _exact_reference():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def frame_and_condition(shape, samples=1, targets=1):
    generator = torch.Generator(device="cuda").manual_seed(0)
    y = torch.randn(targets, *shape, device="cuda", generator=generator).relu()
    x = y.repeat_interleave(samples // targets, 0)
    return (x + 0.2 * torch.randn(x.shape, device="cuda", generator=generator)).relu(), y


def by_reference(x, target, dtype):
    x = x.to(dtype).requires_grad_()
    terms = reference.sliced_terms(x, target)
    (gradient,) = torch.autograd.grad(terms.sum(), x)
    return terms.detach(), gradient


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("method", ["auto", "merge", "sort"])
def test_layers_of_a_real_frame(shape, method):
    needs(24)
    x, y = frame_and_condition(shape)
    assert_accurate(x, y, 32, method)


def assert_accurate(x, y, num_projections, method):
    """The rule for a backend: loss within 1e-5, gradient error at most twice that of the reference in float32."""
    options = {"num_projections": num_projections}
    terms, gradient = sliced_terms(x, sort_target(y, **options), True, method=method)
    true_terms, true_gradient = by_reference(x, sort_target(y.double(), **options), torch.float64)
    _, single = by_reference(x, sort_target(y, **options), torch.float32)
    torch.testing.assert_close(terms.double(), true_terms, rtol=1e-5, atol=0)
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    assert error <= 2 * (single - true_gradient).norm() / true_gradient.norm() + 1e-6
    assert torch.cosine_similarity(gradient.flatten().double(), true_gradient.flatten(), 0) > 0.9999


def compare_rows(method, v, fixed, form):
    import importlib

    module, name = {
        "rows": ("rows", "rows_fwd"),
        "merge": ("merge", "merge_fwd"),
        "count": ("count", "count_fwd"),
        "sort": ("library_sort", "sort_fwd"),
    }[method]
    return getattr(importlib.import_module(f"vcd_fast.kernels.{module}"), name)(v, *fixed, form)


def rows_of(m, form, rows, noise, make_rows):
    generator = torch.Generator().manual_seed(m)
    y = torch.randn(1, rows, m + 4, generator=generator)
    x = y + noise * torch.randn(y.shape, generator=generator)
    return make_rows(x, y, 4, form)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("m", [1000, 4096, 4097, 12510, 50048])
@pytest.mark.parametrize("noise", [0.3, 1e-4, 0.0])
def test_long_rows_against_the_full_lists(method, form, m, noise, make_rows, full_lists):
    if method == "rows" and m > 4096:
        pytest.skip("too long for one program")
    rows = rows_of(m, form, 6, noise, make_rows)
    cost, sign = compare_rows(method, rows.v, rows.fixed[:3], form)
    true_cost, gradient = full_lists(rows)
    torch.testing.assert_close(cost.double(), true_cost, rtol=1e-5, atol=1e-2 if noise == 0 else 0)
    if noise > 0:
        assert (sign[..., : rows.kept] != gradient).float().mean() < 1e-4, "float64 sees ties where float32 has some"


@pytest.mark.parametrize("method", ["merge", "count", "sort"])
def test_rows_of_one_value_and_of_nan_do_not_hang(method, make_rows):
    m = 50048
    x = torch.zeros(1, 3, m + 2)
    x[0, 1] = float("nan")
    x[0, 2, ::2] = float("inf")
    rows = make_rows(x, torch.zeros(1, 3, m + 2), 2, 1)
    cost, sign = compare_rows(method, rows.v, rows.fixed[:3], 1)
    assert cost[0, 0] == 0
    assert cost[0, 1].isnan()
    assert cost[0, 2].isinf()
    assert sign[..., : m + 2].abs().max() <= 2


@pytest.mark.parametrize("method", ["rows", "merge", "count", "sort"])
def test_rows_behind_two_to_the_31(method, make_rows):
    """The last rows of more than 2**31 elements are compared like the same rows alone."""
    m = 4092 if method == "rows" else 65532
    pitch = m + 4
    count = 2**31 // pitch + 40
    needs({"rows": 20, "merge": 60, "count": 80, "sort": 100}[method])
    few = rows_of(m, 1, 8, 0.3, make_rows)
    v = torch.empty(count // 8, 8, pitch, device="cuda")
    v.copy_(few.v[..., :pitch])
    assert v.numel() > 2**31
    cost, sign = compare_rows(method, v, few.fixed[:3], 1)
    want_cost, want_sign = compare_rows(method, few.v[..., :pitch].contiguous(), few.fixed[:3], 1)
    torch.testing.assert_close(cost[-1], want_cost[0])
    assert torch.equal(sign[-1], want_sign[0])


def test_projections_behind_two_to_the_31():
    from vcd_fast.distance.spectrum import half_plane
    from vcd_fast.kernels.project import project_fwd

    needs(40)
    plane = half_plane(272, 368, "cuda")
    kept = len(plane.representatives) + 4
    index = torch.cat([plane.representatives, plane.self_conjugate]).to(torch.int32)
    samples = 2**31 // (256 * kept) + 2
    half = torch.randn(samples, 1, 272 * 185, dtype=torch.complex64, device="cuda")
    directions = torch.randn(256, 1, device="cuda")
    amplitude, _ = project_fwd(half.view(torch.int64), index, directions, kept - 4, 4, phase=False)
    assert amplitude.numel() > 2**31
    want = directions @ half[-1][:, index.long()].abs()
    torch.testing.assert_close(amplitude[-1, :, : kept - 4], want[:, : kept - 4], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def vcd():
    """VCDLoss with the recipe's weights, a clip, and its condition's side."""
    with pytest.warns(UserWarning, match="random weights"):
        loss = VCDLoss(extractor=VGG19Features("random"), num_projections=16, chunk_frames=2, backend="triton").cuda()
    generator = torch.Generator(device="cuda").manual_seed(0)
    video = torch.rand(1, 5, 3, 272, 368, device="cuda", generator=generator)
    return loss, video, loss.prepare(video[:, 0])


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [LAYERS[1], LAYERS[3]])
@pytest.mark.parametrize("options", [{}, {"p": 2}, {"slicing": "flat"}, {"slicing": "patch"}, {"domain": "feature"}])
def test_nothing_waits_for_the_device(shape, options):
    """Forward, and backward of an upstream gradient of any kind; the condition's side too where the directions are there."""
    needs(40)
    x, y = frame_and_condition(shape, samples=2)
    x.requires_grad_()
    target = sort_target(y, **options, **({} if options.get("slicing") == "flat" else {"num_projections": 8}))
    upstream = torch.rand(2, 2, device="cuda")[:, 0]

    def loss_and_gradient():
        return torch.autograd.grad(sliced_wasserstein(x, target), x, upstream)

    loss_and_gradient()  # compiles the kernels and makes the tables
    with no_waiting():
        loss_and_gradient()
        if target.projections is not None:
            sort_target(
                y, target.projections.unflatten(1, (shape[0], *2 * [5 if "slicing" in options else 1])), **options
            )


@pytest.mark.parametrize("own", [0, 2])
def test_the_whole_loss_waits_for_nothing(vcd, own):
    loss, video, target = vcd
    index = [(t - own) % 5 for t in range(5)]  # the condition's frame is left out of the middle
    video = video.clone().requires_grad_()

    def step():
        return torch.autograd.grad(loss(video, target, frame_index=index, num_frames=5), video)[0]

    want = step()
    with no_waiting():
        got = step()
    assert (got - want).norm() <= 0.01 * want.norm()  # cuDNN may add up in another order


def captured(function):
    """function() recorded in a CUDA graph: -> the graph and what the function returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return graph, found


@pytest.mark.parametrize("method", ["auto", "merge"])
def test_captured_in_a_cuda_graph(method, monkeypatch):
    monkeypatch.setenv("VCD_FAST_TRITON_METHOD", method)
    x, y = frame_and_condition(LAYERS[2])
    x.requires_grad_()
    target = sort_target(y, num_projections=16)

    def loss_and_gradient():
        loss = sliced_wasserstein(x, target, backend="triton")
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    graph, found = captured(loss_and_gradient)
    with torch.no_grad():
        x.copy_(x.roll(3, -1))
    graph.replay()
    for got, want in zip(found, loss_and_gradient(), strict=True):
        assert torch.equal(got, want)


def test_the_whole_loss_in_a_cuda_graph(vcd):
    loss, video, target = vcd
    video = video.clone().requires_grad_()

    def loss_and_gradient():
        value = loss(video, target)
        return value.detach(), torch.autograd.grad(value, video)[0]

    graph, found = captured(loss_and_gradient)
    with torch.no_grad():
        video.copy_(video.flip(-1))
    graph.replay()
    for got, want in zip(found, loss_and_gradient(), strict=True):
        assert (got - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("slicing", ["channel", "patch"])
def test_tf32_elsewhere_changes_nothing(slicing):
    """A program that lets its own products be rounded: both sides of the distance stay exact, and its setting stays."""
    needs(24)
    x, y = frame_and_condition(LAYERS[3])
    x.requires_grad_()
    results = []
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = allowed
            target = sort_target(y, num_projections=16, slicing=slicing)
            loss = sliced_wasserstein(x, target)
            results.append([target.parts[1].representatives, loss.detach()])
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    torch.testing.assert_close(*(lists for lists, _ in results), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(loss for _, loss in results), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["vcd_small", "vcd_odd_size"])
def test_published_loss_of_a_clip(name):
    """As on the CPU: exact but for phases that hang on the rounding of an FFT."""
    golden = {key: value.cuda() for key, value in load_file(GOLDENS / f"{name}.safetensors").items()}
    with pytest.warns(UserWarning, match="random weights"):
        extractor = VGG19Features("random").cuda()
    directions = {layer: golden[f"projections.{layer}"] for layer in VCD_LAYERS}
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # of VGG19's convolutions
    try:
        found = VCDLoss(extractor=extractor, projections=directions, backend="triton").details(
            golden["video"].float(), golden["condition"].float()
        )
    finally:
        torch.backends.cudnn.allow_tf32 = before
    torch.testing.assert_close(found.terms[..., 0].double(), golden["terms"][..., 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.loss.double(), golden["loss"], rtol=1e-3, atol=0)


def test_rule_on_features_of_vgg19():
    """A photograph that moved and changed; almost empty channels, whose phases are rounding, get some light."""
    with pytest.warns(UserWarning, match="random weights"):
        extractor = VGG19Features("random").cuda()
    generator = torch.Generator().manual_seed(0)
    still = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16, generator=generator), (272, 368), mode="bicubic")
    moved = still.roll((2, 3), (-2, -1)) * 0.97 + 0.02 * torch.rand(still.shape, generator=generator)
    pair = extractor(torch.cat([moved, still]).clamp(0, 1).cuda())
    for layer in ("relu2_1", "relu4_1"):
        light = 1e-3 * torch.rand(pair[layer].shape, generator=generator).cuda()
        x, y = (pair[layer] + light).split(1)
        assert_accurate(x, y, 32, "auto")


@pytest.mark.parametrize("method", ["merge", "count"])
def test_the_same_bits_every_time(method):
    x, y = frame_and_condition(LAYERS[1])
    target = sort_target(y, num_projections=32)
    first, second = (sliced_terms(x, target, True, method=method) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_memory_does_not_depend_on_the_number_of_directions_or_samples():
    peaks = []
    for samples, count in ((1, 64), (1, 256), (4, 64)):
        x, y = frame_and_condition(LAYERS[0], samples=samples)
        target = sort_target(y, num_projections=count)
        sliced_terms(x, target, True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        terms, gradient = sliced_terms(x, target, True)
        peaks.append(torch.cuda.max_memory_allocated() - before - gradient.nbytes - terms.nbytes)
        spectra = 4 * 64 * 272 * 185 * 8
        assert peaks[-1] < triton_fused.CHUNK_VALUES * 48 + spectra
    assert max(peaks) < 1.2 * min(peaks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_on_the_device_of_the_tensors():
    x, y = frame_and_condition(LAYERS[3])
    want = sliced_terms(x, sort_target(y, num_projections=4), True)
    x, y = x.to("cuda:1"), y.to("cuda:1")
    got = sliced_terms(x, sort_target(y, num_projections=4), True)
    torch.testing.assert_close(got[0].to("cuda:0"), want[0])


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precision_of_the_projections(precision):
    if torch.version.hip and precision == "tf32x3":
        pytest.skip("not known to Triton on AMD GPUs")
    x, y = frame_and_condition(LAYERS[2])
    target = sort_target(y, num_projections=32)
    terms, _ = sliced_terms(x, target, True, precision=precision)
    true_terms, _ = by_reference(x, sort_target(y.double(), num_projections=32), torch.float64)
    torch.testing.assert_close(terms.double(), true_terms, rtol=1e-2 if precision == "tf32" else 1e-5, atol=0)
