import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vcd_fast
from vcd_fast.distance.streaming import chunks


@pytest.mark.parametrize("clips", [1, 2, 5])
@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunks_cover_every_frame_once_in_order(clips, frames, size):
    seen = []
    for c, f in chunks(clips, frames, size):
        images = [(i, j) for i in range(clips)[c] for j in range(frames)[f]]
        assert 0 < len(images) <= max(size, 1)
        assert len(images) % len(range(clips)[c]) == 0
        seen += images
    assert seen == [(i, j) for i in range(clips) for j in range(frames)]


def test_gradcheck(tiny_loss, clip):
    video = clip(2, 2, 4, 4).requires_grad_()
    image = clip(2, 1, 4, 4, seed=9)[:, 0]
    loss = tiny_loss(num_projections=3)
    assert torch.autograd.gradcheck(
        lambda v: loss(v, image, reduction="none"), video, eps=1e-7, atol=1e-6, check_batched_grad=False
    )


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 4, 6, 100])
def test_chunks_change_neither_loss_nor_gradient(tiny_loss, clip, chunk_frames):
    video = clip(3, 4).requires_grad_()
    want = tiny_loss(chunk_frames=1000)(video, reduction="none")
    got = tiny_loss(chunk_frames=chunk_frames)(video, reduction="none")
    torch.testing.assert_close(got, want)
    upstream = torch.rand(3, 3, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, video, upstream)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)


def test_at_most_a_chunk_is_evaluated_at_once(tiny_loss, extractor, clip):
    loss = tiny_loss(chunk_frames=2)
    target = loss.prepare(clip(1, 1)[:, 0])
    extractor.calls = extractor.images = 0
    loss(clip(1, 8), target)
    assert (extractor.calls, extractor.images) == (4, 7)


def test_gradient_of_a_frame_is_its_own(tiny_loss, clip):
    """Upstream gradients that differ per clip and frame reach their frames, and no other."""
    video = clip(2, 4).requires_grad_()
    per_frame = tiny_loss()(video, reduction="none")
    upstream = torch.zeros(2, 3, dtype=torch.float64)
    upstream[1, 2] = 1
    (one,) = torch.autograd.grad(per_frame, video, upstream, retain_graph=True)
    assert not one[0].any()
    assert not one[1, :3].any()
    (every,) = torch.autograd.grad(per_frame, video, torch.ones_like(per_frame), retain_graph=True)
    torch.testing.assert_close(every[1, 3], one[1, 3])
    (scaled,) = torch.autograd.grad(per_frame, video, torch.tensor(-2.5, dtype=torch.float64).expand(2, 3))
    torch.testing.assert_close(scaled, -2.5 * every)


def test_graph_can_be_used_twice(tiny_loss, clip):
    video = clip().requires_grad_()
    loss = tiny_loss()(video)
    loss.backward(retain_graph=True)
    first = video.grad.clone()
    loss.backward()
    torch.testing.assert_close(video.grad, 2 * first)


def test_nothing_is_differentiated_unless_a_gradient_is_wanted(tiny_loss, extractor, clip):
    loss = tiny_loss()
    assert not loss(clip()).requires_grad
    with torch.no_grad():
        assert not loss(clip().requires_grad_()).requires_grad
    with torch.inference_mode():
        loss(clip())
    assert loss.details(clip().requires_grad_()).loss.requires_grad is False
    assert extractor.with_gradient
    assert not any(extractor.with_gradient)


def test_nothing_of_the_inside_survives_the_forward(tiny_loss, extractor, clip):
    inside = []
    extractor.register_forward_hook(lambda _, args, found: inside.extend(weakref.ref(x) for x in found.values()))
    loss = tiny_loss()(clip().requires_grad_())
    gc.collect()
    assert len(inside) >= 4
    assert not any(ref() is not None for ref in inside)
    loss.backward()


def test_saved_tensor_hooks_see_the_gradient_alone(tiny_loss, clip):
    video = clip(1, 3).requires_grad_()
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tiny_loss()(video, reduction="none")
    assert packed.count((1, 2, 3, 10, 9)) == 1
    assert all(len(shape) <= 1 or shape == (1, 2, 3, 10, 9) for shape in packed)
    loss.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_runs_the_loss_twice_not_more(tiny_loss, extractor, clip, use_reentrant):
    video = clip(1, 3).requires_grad_()
    loss = tiny_loss(chunk_frames=1)
    target = loss.prepare(video[:, 0].detach())
    loss(video, target).backward()
    want, video.grad = video.grad, None
    extractor.calls = 0
    checkpoint(lambda v: loss(v * 1.0, target), video, use_reentrant=use_reentrant).backward()
    assert extractor.calls == 4
    torch.testing.assert_close(video.grad, want)


def test_offloading_runs_the_loss_once(tiny_loss, extractor, clip):
    video = clip(1, 3).requires_grad_()
    loss = tiny_loss(chunk_frames=1)
    target = loss.prepare(video[:, 0].detach())
    loss(video, target).backward()
    want, video.grad = video.grad, None
    extractor.calls = 0
    with torch.autograd.graph.save_on_cpu():
        value = loss(video * 1.0, target)
    value.backward()
    assert extractor.calls == 2
    torch.testing.assert_close(video.grad, want)


def test_what_is_kept_of_a_half_precision_video_is_float32(clip):
    def extractor(images):
        return {"one": images.float()}

    kept, video = [], clip(1, 3).half().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = vcd_fast.vcd_loss(video, extractor=extractor, layers=("one",), num_projections=4)
    assert [t.dtype for t in kept if t.ndim == 5] == [torch.float32]
    assert loss.dtype == torch.float32
    loss.backward()
    assert video.grad.dtype == torch.float16


def test_a_second_derivative_is_refused(tiny_loss, clip):
    video = clip().requires_grad_()
    (gradient,) = torch.autograd.grad(tiny_loss()(video), video, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.square().sum().backward()


def test_in_a_second_thread(tiny_loss, clip):
    import threading

    video = clip().requires_grad_()
    loss = tiny_loss()
    result = []
    thread = threading.Thread(target=lambda: result.append(torch.autograd.grad(loss(video), video)[0]))
    thread.start()
    thread.join()
    torch.testing.assert_close(result[0], torch.autograd.grad(loss(video), video)[0])


def test_gradient_has_the_videos_dtype(tiny_loss, clip):
    video = clip().bfloat16().requires_grad_()
    loss = tiny_loss()(video)
    assert loss.dtype == torch.float64  # the extractor's
    loss.backward()
    assert video.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("function", [False, True])
def test_compiled_code_calls_it_uncompiled(tiny_loss, extractor, clip, function):
    """A graph break, and a program that wants none is told."""
    loss, options = tiny_loss(), {"extractor": extractor, "layers": ("one", "two"), "num_projections": 8}

    def reward(video):
        found = vcd_fast.vcd_loss(video * 0.5, **options) if function else loss(video * 0.5)
        return -found * 2

    video = clip().requires_grad_()
    want = reward(video)
    (gradient,) = torch.autograd.grad(want, video)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    got = torch.compile(reward, backend=backend)(video)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, video)[0], gradient)
    assert len(graphs) == 2, "what stands before it and what stands behind it"
    assert all(len(nodes) <= 2 for nodes in graphs), graphs
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(reward, backend="eager", fullgraph=True)(video)
