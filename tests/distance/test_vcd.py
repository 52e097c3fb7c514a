import copy
import math

import pytest
import torch

from vcd_fast import PRESETS, VCDConfig, VCDLoss, sliced_wasserstein, vcd_loss
from vcd_fast.distance.config import VCD_LAYERS


@pytest.fixture(scope="session")
def vgg64(vgg):
    return copy.deepcopy(vgg).double()


def directions_of(tensors):
    return {layer: tensors[f"projections.{layer}"] for layer in VCD_LAYERS}


@pytest.mark.parametrize("name", ["vcd_small", "vcd_odd_size"])
def test_golden_terms_and_loss(golden, vgg64, branch_cut_bound, name):
    """Exact, except where the published code's phases hang on the rounding of an FFT: there, within what that can do."""
    tensors = golden(name)
    directions = directions_of(tensors)
    video, condition = tensors["video"].double(), tensors["condition"].double()
    got = VCDLoss(extractor=vgg64, projections=directions).details(video, condition)
    bounds = torch.stack(
        [branch_cut_bound(maps, directions[layer].double()) for layer, maps in vgg64(video.flatten(0, 1)).items()], -1
    ).unflatten(0, video.shape[:2])
    bounds = bounds[:, 1:] + bounds[:, :1]
    error = (got.terms - tensors["terms"]).abs()
    assert (error[..., 0] <= 1e-12 * tensors["terms"][..., 0]).all()
    assert (error[..., 1] <= 1e-12 + bounds).all()
    assert (error[..., 1] <= 1e-12).float().mean() >= 0.75
    assert (got.per_frame - tensors["weighted_per_frame"]).abs().max() <= 1e-12 + bounds.sum(-1).max()
    assert ((got.loss - tensors["loss"]).abs() <= 3e-5 * tensors["loss"]).all()
    assert got.layers == VCD_LAYERS
    assert got.parts == ("amplitude", "phase")
    n = video.shape[1]
    assert got.frame_index == tuple(range(1, n))
    assert got.weights.tolist() == [(n - f) / n for f in range(1, n)]


@pytest.mark.parametrize(
    ("double", "backend"), [(True, "reference"), (False, "reference"), (False, "simd"), (False, "auto")]
)
@pytest.mark.parametrize(("name", "error"), [("vcd_small", 0.06), ("vcd_odd_size", 0.006)])
def test_golden_gradient(golden, vgg, vgg64, name, error, double, backend):
    """The rounding of an FFT that moves a phase from +π to -π moves ranks: `error` is what it does to these two clips."""
    tensors = golden(name)
    dtype = torch.float64 if double else torch.float32
    loss = VCDLoss(extractor=vgg64 if double else vgg, projections=directions_of(tensors), backend=backend)
    video = tensors["video"].to(dtype).requires_grad_()
    value = loss(video, tensors["condition"].to(dtype))
    torch.testing.assert_close(value.double(), tensors["loss"].mean(), rtol=3e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, video)
    want = tensors["grad_video_of_mean_loss"]
    assert (gradient - want).norm() <= error * want.norm()
    assert not gradient[:, 0].any()


def by_hand(extractor, video, image, **options):
    """Eq. 2 from `sliced_wasserstein`, frame by frame -> [B, T - 1], temporal weights left out."""
    fixed = extractor(image)
    columns = []
    for frame in video[:, 1:].unbind(1):
        maps = extractor(frame)
        terms = [sliced_wasserstein(maps[n], fixed[n], layer=n, backend="reference", **options) for n in ("one", "two")]
        columns.append(sum(terms))
    return torch.stack(columns, 1)


def test_equation_two(tiny_loss, extractor, clip):
    video, image = clip(), clip(frames=1, seed=3)[:, 0]
    want = by_hand(extractor, video, image, num_projections=8) * torch.tensor([0.75, 0.5, 0.25])
    torch.testing.assert_close(tiny_loss()(video, image, reduction="none"), want)
    torch.testing.assert_close(tiny_loss()(video, image), want.mean())
    torch.testing.assert_close(tiny_loss()(video, image, reduction="sum"), want.sum())


@pytest.mark.parametrize(
    ("preset", "options", "weighted"),
    [
        ("vcd_amp", {"phase_weight": 0.0}, True),
        ("vcd_phase", {"amplitude_weight": 0.0}, True),
        ("vcd_no_temporal_weight", {}, False),
        ("vcd_feature", {"domain": "feature"}, True),
        ("fdl", {"slicing": "patch", "patch_size": 2}, False),
    ],
)
def test_presets(tiny_loss, extractor, clip, preset, options, weighted):
    video, image = clip(), clip(frames=1, seed=3)[:, 0]
    want = by_hand(extractor, video, image, num_projections=8, **options)
    if weighted:
        want = want * torch.tensor([0.75, 0.5, 0.25])
    torch.testing.assert_close(tiny_loss(preset)(video, image, reduction="none"), want)


@pytest.mark.parametrize("domain", ["frequency", "feature"])
def test_l2_preset(tiny_loss, extractor, clip, domain):
    video, image = clip(), clip(frames=1, seed=3)[:, 0]
    want = torch.zeros(2, 3, dtype=torch.float64)
    for name, y in extractor(image).items():
        for i, frame in enumerate(video[:, 1:].unbind(1)):
            x = extractor(frame)[name]
            if domain == "feature":
                want[:, i] += 2 * (x - y).flatten(1).norm(dim=1)
            else:
                a, b = torch.fft.fft2(x), torch.fft.fft2(y)
                want[:, i] += (a.abs() - b.abs()).flatten(1).norm(dim=1) + (a.angle() - b.angle()).flatten(1).norm(
                    dim=1
                )
    got = tiny_loss("vcd_l2", domain=domain, temporal_weight="none")(video, image, reduction="none")
    torch.testing.assert_close(got, want)


def test_l2_of_equal_images_is_zero_with_gradient_zero(tiny_loss, clip):
    video = clip(1, 1).expand(-1, 3, -1, -1, -1).clone().requires_grad_()
    loss = tiny_loss("vcd_l2")(video)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, video)[0].any()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_still_clip_is_at_distance_zero(tiny_loss, clip, preset):
    video = clip(1, 1).expand(-1, 3, -1, -1, -1)
    assert tiny_loss(preset)(video).abs().item() < 1e-12


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_gradcheck_of_presets(tiny_loss, clip, preset):
    loss = tiny_loss(preset, num_projections=3)
    image = clip(1, 1, 6, 5, seed=1)[:, 0]
    video = clip(1, 2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(v, image), video, eps=1e-7, atol=1e-6, fast_mode=True)


def test_layer_reduction(tiny_loss, clip):
    torch.testing.assert_close(2 * tiny_loss(layer_reduction="mean")(clip()), tiny_loss()(clip()))


def test_layers_may_be_a_selection(tiny_loss, clip):
    details = tiny_loss(layers=("two",)).details(clip())
    assert details.terms.shape == (2, 3, 1, 2)
    both = tiny_loss().details(clip())
    torch.testing.assert_close(details.terms[:, :, 0], both.terms[:, :, 1])
    assert both.layers == ("one", "two")


def test_details_add_up(tiny_loss, clip):
    loss = tiny_loss(amplitude_weight=0.5, phase_weight=2.0)
    details = loss.details(clip())
    want = (details.terms @ torch.tensor([0.5, 2.0], dtype=torch.float64)).sum(-1) * details.weights
    torch.testing.assert_close(details.per_frame, want)
    torch.testing.assert_close(details.loss, want.mean(1))
    torch.testing.assert_close(loss(clip(), reduction="none"), want)


def test_condition_is_the_first_frame_by_default(tiny_loss, clip):
    video = clip().requires_grad_()
    loss = tiny_loss()
    torch.testing.assert_close(loss(video), loss(video, video[:, 0].detach()))
    (gradient,) = torch.autograd.grad(loss(video), video)
    assert not gradient[:, 0].any()
    assert gradient[:, 1:].flatten(2).any(-1).all()


def test_no_gradient_reaches_the_condition(tiny_loss, clip):
    image = clip(frames=1)[:, 0].requires_grad_()
    assert not tiny_loss()(clip(seed=1), image).requires_grad


def test_some_frames_of_a_clip(tiny_loss, clip):
    video, image = clip(2, 6), clip(2, 1, seed=3)[:, 0]
    every = tiny_loss()(video, image, reduction="none")
    some = tiny_loss()(video[:, [2, 5]], image, frame_index=[2, 5], num_frames=6, reduction="none")
    torch.testing.assert_close(some, every[:, [1, 4]])
    with_first = tiny_loss()(video[:, [0, 4, 1]], frame_index=torch.tensor([0, 4, 1]), num_frames=6, reduction="none")
    torch.testing.assert_close(with_first, tiny_loss()(video, reduction="none")[:, [3, 0]])
    one = tiny_loss()(video[:, 3:4], image, frame_index=(3,), num_frames=6)
    torch.testing.assert_close(one, every[:, 2].mean())


def test_gradient_reaches_frames_in_any_order(tiny_loss, clip):
    video, image = clip(1, 4), clip(1, 1, seed=3)[:, 0]
    whole = video.clone().requires_grad_()
    tiny_loss()(whole, image, reduction="sum").backward()
    some = video[:, [3, 0, 1]].clone().requires_grad_()
    tiny_loss()(some, image, frame_index=[3, 0, 1], num_frames=4, reduction="sum").backward()
    torch.testing.assert_close(some.grad[:, [0, 2]], whole.grad[:, [3, 1]])
    assert not some.grad[:, 1].any()


def test_condition_may_stand_elsewhere(tiny_loss, clip):
    video = clip(2, 4)
    got = tiny_loss(condition_frame=-1).details(video)
    assert got.frame_index == (0, 1, 2)
    assert got.weights.tolist() == [0.25, 0.5, 0.75]
    backwards = tiny_loss()(video.flip(1), reduction="none")
    torch.testing.assert_close(got.per_frame, backwards.flip(1))


def test_temporal_weight_may_be_a_function(tiny_loss, clip):
    got = tiny_loss(temporal_weight=lambda frame, n: 1.0 if frame == n - 1 else 0.0)(clip(), reduction="none")
    assert not got[:, :-1].any()
    assert got[:, -1].all()


def test_one_target_serves_many_calls(tiny_loss, extractor, clip):
    loss, image = tiny_loss(), clip(2, 1, seed=3)[:, 0]
    target = loss.prepare(image)
    assert (target.batch_size, target.image_size, target.device.type) == (2, (10, 9), "cpu")
    extractor.images = 0
    torch.testing.assert_close(loss(clip(), target), tiny_loss()(clip(), image))
    assert extractor.images == 6 + 6 + 2
    torch.testing.assert_close(loss(clip()[1:], target[1:]), loss(clip(), target, reduction="none")[1:].mean())
    values = [t for layer in target.layers.values() for p in layer.parts for t in (p.representatives, p.self_conjugate)]
    assert target.nbytes == sum(v.nbytes for v in values) + 8 * 8 * (6 + 5)


@pytest.mark.parametrize("preset", ["vcd", "vcd_l2"])
def test_one_image_for_all_clips(tiny_loss, clip, preset):
    video, image = clip(3, 4), clip(1, 1, seed=3)[:, 0]
    got = tiny_loss(preset, chunk_frames=2)(video, image, reduction="none")
    torch.testing.assert_close(got, tiny_loss(preset)(video, image.expand(3, -1, -1, -1), reduction="none"))


def test_clips_of_a_batch_are_independent(tiny_loss, clip):
    video = clip(3, 3)
    apart = torch.cat([tiny_loss()(video[i : i + 1], reduction="none") for i in range(3)])
    torch.testing.assert_close(tiny_loss()(video, reduction="none"), apart)


def test_seed_redraws_the_directions(tiny_loss, clip):
    assert tiny_loss()(clip()) == tiny_loss(seed=0)(clip())
    assert tiny_loss()(clip()) != tiny_loss(seed=1)(clip())


def test_given_directions(tiny_loss, extractor, clip):
    directions = {"one": torch.randn(3, 6), "two": torch.randn(3, 5)}
    got = tiny_loss(projections=directions, temporal_weight="none")(clip(), reduction="none")
    video, fixed, want = clip(), extractor(clip()[:, 0]), 0
    for name, values in directions.items():
        maps = [extractor(frame)[name] for frame in video[:, 1:].unbind(1)]
        want = want + torch.stack([sliced_wasserstein(x, fixed[name], values, backend="reference") for x in maps], 1)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="projections: expected directions for every layer, got none for two"):
        tiny_loss(projections={"one": directions["one"]})


def test_nan_ends_in_nan_and_stays_in_its_frame(tiny_loss, clip):
    video = clip()
    video[1, 2, 0, 3, 3] = math.nan
    got = tiny_loss()(video, reduction="none")
    assert got.isnan().tolist() == [[False, False, False], [False, True, False]]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(vgg, clip, autocast, dtype):
    loss = VCDLoss(extractor=vgg, num_projections=4, layers=("relu1_1", "relu2_1"))
    video = clip(1, 2, 16, 20).to(dtype).requires_grad_()
    want = loss(video)
    want.backward()
    gradient, video.grad = video.grad, None
    with torch.autocast("cpu", dtype=autocast):
        got = loss(video)
        got.backward()
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(video.grad, gradient)


def test_half_precision_video_is_computed_in_the_extractors_dtype(vgg, clip):
    loss = VCDLoss(extractor=vgg, num_projections=4)
    video = clip(1, 2, 16, 20).half()
    assert torch.equal(loss(video), loss(video.float()))


def test_extractor_in_bfloat16(vgg, clip):
    """Amplitudes and their gradient follow; phases of features with eight bits of mantissa do so in the mean alone."""
    video = clip(1, 2, 32, 40).float().requires_grad_()
    gradients = []
    for options, tolerance in (({"phase_weight": 0.0}, 0.01), ({}, 0.1)):
        want = VCDLoss(extractor=vgg, num_projections=16, **options)(video)
        got = VCDLoss(extractor=copy.deepcopy(vgg), num_projections=16, **options).bfloat16()(video)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
        gradients.append([torch.autograd.grad(loss, video)[0][:, 1].flatten() for loss in (got, want)])
    assert all(g.dtype == torch.float32 for pair in gradients for g in pair)
    assert torch.cosine_similarity(*gradients[0], dim=0) > 0.85


def test_memory_formats_of_extractor_and_video(vgg, clip):
    video = clip(1, 3, 32, 40).float().requires_grad_()
    other = copy.deepcopy(vgg).to(memory_format=torch.channels_last)
    images = video.detach()[0].contiguous(memory_format=torch.channels_last)
    assert other(images)["relu3_1"].is_contiguous(memory_format=torch.channels_last)
    want, got = (
        VCDLoss(extractor=extractor, num_projections=8)(v)
        for extractor, v in ((vgg, video), (other, video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(loss, video)[0] for loss in (got, want)]
    assert (gradients[0] - gradients[1]).norm() <= 0.02 * gradients[1].norm()


def test_inputs_are_left_alone(tiny_loss, clip):
    video, image = clip().requires_grad_(), clip(frames=1)[:, 0]
    copies = video.detach().clone(), image.clone()
    tiny_loss()(video, image).backward()
    assert torch.equal(video.detach(), copies[0])
    assert torch.equal(image, copies[1])


def test_strided_videos(tiny_loss, clip):
    video = clip()
    want = tiny_loss()(video)
    channels_last = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    frames_inside = video.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4)
    for other in (channels_last, frames_inside, torch.stack([video, video], 1).flatten(1, 2)[:, :4]):
        torch.testing.assert_close(tiny_loss()(other), want)


def test_drop_in_function(clip, monkeypatch, tmp_path, vgg):
    from safetensors.torch import save_file

    from vcd_fast.distance.vcd import _shared_vgg19

    save_file(vgg.state_dict(), tmp_path / "vgg19.safetensors")
    monkeypatch.setenv("VCD_FAST_VGG19", str(tmp_path / "vgg19.safetensors"))
    _shared_vgg19.cache_clear()
    video = clip(1, 2, 16, 20)
    want = VCDLoss(extractor=vgg, num_projections=4)(video.float())
    torch.testing.assert_close(vcd_loss(video.float(), num_projections=4), want)
    assert vcd_loss(video, video[:, 0], num_projections=4).dtype == torch.float64
    assert vcd_loss(video.float(), config="vcd_amp", num_projections=4, reduction="none").shape == (1, 1)
    assert _shared_vgg19.cache_info().misses == 2
    _shared_vgg19.cache_clear()


def bad(video=None, condition=None, loss=None, **options):
    return video, condition, loss or {}, options


V = torch.rand(2, 4, 3, 10, 9, dtype=torch.float64)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (bad([V]), TypeError, r"video: expected a tensor \[batch, frames, 3, height, width\], got list"),
        (bad((V * 255).byte()), TypeError, "video: expected floating-point numbers.* got torch.uint8; divide by 255"),
        (bad(V[0]), ValueError, r"video: expected shape \[batch, frames, 3, height, width\], got \[4, 3, 10, 9\]"),
        (bad(V[:, :, :1]), ValueError, "video: expected 3 channels"),
        (bad(V.permute(0, 1, 3, 4, 2)), ValueError, r"got \[2, 4, 10, 9, 3\]; channels come third from last"),
        (bad(V[:0]), ValueError, "video: expected at least one of everything"),
        (bad(V[..., :3]), ValueError, "video: expected images of at least 4×4 pixels, got 10×3"),
        (bad(V * 255), ValueError, r"video: expected values in \[0, 1\], got .* divide by 255"),
        (bad(V * 2 - 1), ValueError, r"clamp it, or map \[-1, 1\] to \[0, 1\] by \(x \+ 1\) / 2"),
        (bad(V + math.inf), ValueError, "video: expected values in"),
        (bad(V[:, :1]), ValueError, "video: expected at least two frames.* name frame_index, num_frames and condition"),
        (bad(V, V[:, 0] * 255), ValueError, "condition: expected values in"),
        (bad(V, V), ValueError, r"condition: expected shape \[batch, 3, height, width\], got \[2, 4, 3, 10, 9\]"),
        (bad(V, V[:, 0, :, :8]), ValueError, "condition: expected the height and width of the video, 10×9, got 8×9"),
        (
            bad(V, V[:, 0].repeat(2, 1, 1, 1)),
            ValueError,
            "condition: expected batch size 1 or that of the video, 2, got 4",
        ),
        (bad(V, num_frames=9), ValueError, "num_frames: expected the number of frames of the video, 4, got 9"),
        (bad(V, frame_index=[1, 2, 3, 4]), ValueError, "num_frames: expected the length of the clip"),
        (
            bad(V, frame_index=[1, 2], num_frames=9),
            ValueError,
            "frame_index: expected a position for each of the 4 frames, got 2",
        ),
        (
            bad(V, frame_index=[1, 2, 3, 9], num_frames=9),
            ValueError,
            r"frame_index: expected positions from 0 to 8, got \[9\]",
        ),
        (bad(V, frame_index=[0.5] * 4, num_frames=9), TypeError, "frame_index: expected whole numbers"),
        (bad(V, frame_index=[1, 2, 3, 4], num_frames=9.0), TypeError, "num_frames: expected a whole number"),
        (bad(V, frame_index=[1, 2, 3, 4], num_frames=9), ValueError, "condition: expected an image, because frame 0"),
        (
            bad(V[:, :1], frame_index=[0], num_frames=9),
            ValueError,
            "frame_index: expected a frame other than the condition's",
        ),
        (bad(V, reduction="max"), ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
        (bad(V, loss={"backend": "gpu"}), ValueError, "backend: expected one of"),
        (bad(V, loss={"chunk_frames": 0}), ValueError, "chunk_frames: expected a whole number of at least 1"),
        (bad(V, loss={"extractor": "vgg16"}), ValueError, "extractor: expected 'vgg19' or a callable"),
        (bad(V, loss={"extractor": 3}), TypeError, "extractor: expected 'vgg19' or a callable"),
        (
            bad(V, loss={"layers": ("one", "three")}),
            ValueError,
            "layers: expected some of the extractor's, one, two, got three",
        ),
        (
            bad(V, loss={"config": "fdl", "patch_size": 5}),
            ValueError,
            r"y \(two\): expected feature maps of at least 5×5",
        ),
        (bad(V, loss={"condition_frame": 4}), ValueError, "condition_frame: expected a frame of a clip of 4, got 4"),
    ],
)
def test_bad_input_is_named(tiny_loss, case, error, message):
    video, condition, loss, options = case
    with pytest.raises(error, match=message):
        tiny_loss(**loss)(video, condition, **options)


def test_range_check_can_be_left_out(tiny_loss):
    assert tiny_loss(check_range=False)(V * 2).isfinite()


def test_values_a_decoder_rounded_past_the_range_pass(tiny_loss):
    assert tiny_loss()(V * 1.0005).isfinite()


def test_a_target_of_another_loss_is_refused(tiny_loss):
    target = tiny_loss(seed=1).prepare(V[:, 0])
    with pytest.raises(ValueError, match="condition: prepared by a loss with other options"):
        tiny_loss()(V, target)


def test_config_object_and_changes(tiny_loss):
    assert tiny_loss(VCDConfig(p=2)).config.p == 2
    assert tiny_loss(p=2).config == tiny_loss(VCDConfig(p=2)).config
