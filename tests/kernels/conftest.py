"""Kernel tests: on the GPU if there is one, else in Triton's interpreter; float64 references; poisoned memory."""

import inspect
from typing import NamedTuple

import pytest
import torch
import triton.language as tl

PLAIN, EVEN, ODD = 0, 1, 2


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    """The interpreter does two things slowly that bitonic sorts do all the time; the same result, tens of times faster.

    It reduces by xor one element at a time, and it replaces all of triton.language again at every call of a device function.
    """
    if type(tl.sort).__name__ != "InterpretedFunction":
        if torch.cuda.is_available():
            yield
            return
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU to compile for")
    import numpy as np
    from triton.runtime import interpreter

    reduce_one_by_one, replace_language = interpreter.ReduceOps.generic_reduce, interpreter._patch_lang

    def generic_reduce(self, operands):
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce_one_by_one(self, operands)
        reduced = np.bitwise_xor.reduce(operands[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, operands[0].dtype)

    replaced: set[frozenset] = set()  # while a kernel runs: the modules that are replaced already
    modules: dict[int, frozenset] = {}

    class Nothing:
        def restore(self):
            """There is nothing to undo."""

    def patch_lang(function):
        key = id(function.__globals__)
        if key not in modules:
            values = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            modules[key] = frozenset(id(value) for value in values if value in (tl, tl.core))
        if modules[key] in replaced:
            return Nothing()
        outermost = not replaced
        replaced.add(modules[key])
        scope = replace_language(function)
        if outermost:
            restore = scope.restore

            def restore_and_forget():
                replaced.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter.ReduceOps.generic_reduce, interpreter._patch_lang = generic_reduce, patch_lang
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors here are tiny
    yield
    torch.set_num_threads(threads)
    interpreter.ReduceOps.generic_reduce, interpreter._patch_lang = reduce_one_by_one, replace_language


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """`torch.empty` hands out memory full of NaN, or of large integers: what a kernel does not write shows."""

    def poison(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            real = tensor.is_floating_point() or tensor.is_complex()
            with torch.no_grad():
                return tensor.fill_(float("nan") if real else torch.iinfo(tensor.dtype).max)

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Rows(NamedTuple):
    """Rows in half form and the target they are compared with."""

    v: torch.Tensor
    """[targets · frames, directions, pitch], NaN behind the m + S values of a row"""
    representatives: torch.Tensor
    own: torch.Tensor
    place: torch.Tensor
    form: int

    @property
    def fixed(self):
        return self.representatives, self.own, self.place, self.form

    @property
    def kept(self):
        return self.representatives.shape[-1] + self.own.shape[-1]


@pytest.fixture
def make_rows(device):
    """make_rows(x [targets · frames, K, m + S], y [targets, K, m + S], S, form) -> Rows."""
    from vcd_fast.kernels.half_list import single_places
    from vcd_fast.kernels.launch import row_pitch

    def make(x, y, singles, form):
        x, y = x.to(device, torch.float32), y.to(device, torch.float32)
        m = x.shape[-1] - singles
        w = y[..., :m].abs() if form == ODD else y[..., :m]
        w, own = w.sort(-1).values.contiguous(), y[..., m:].sort(-1).values.contiguous()
        v = torch.full((*x.shape[:-1], row_pitch(x.shape[-1])), float("nan"), device=device)
        v[..., : x.shape[-1]] = x
        return Rows(v, w, own, single_places(w, own, form), form)

    return make


@pytest.fixture
def random_rows(make_rows):
    """random_rows(m, S, form, ...) -> Rows: a target, and rows that differ from it by noise and a shift."""

    def make(m, singles, form, targets=1, frames=2, directions=2, noise=0.3, shift=0.1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randn(targets, directions, m + singles, generator=generator)
        x = y.repeat_interleave(frames, 0)
        x = x + shift + noise * torch.randn(x.shape, generator=generator)
        return make_rows(x, y, singles, form)

    return make


@pytest.fixture(scope="session")
def full_lists():
    """full_lists(rows) -> cost and derivatives in float64, from the full lists, sorted: the definition."""

    def reference(rows, power=1):
        w, own = rows.representatives.double(), rows.own.double()
        m, kept, frames = w.shape[-1], rows.kept, rows.v.shape[0] // w.shape[0]
        v = rows.v[..., :kept].double().requires_grad_()
        pairs, alone = v[..., :m], v[..., m:]

        def whole(values, single):
            if rows.form == PLAIN:
                return values
            return torch.cat([values, values if rows.form == EVEN else -values, single], -1)

        target = whole(w, own).sort(-1).values.repeat_interleave(frames, 0)
        cost = (whole(pairs, alone).sort(-1).values - target).abs().pow(power).sum(-1)
        (gradient,) = torch.autograd.grad(cost.sum(), v)
        return cost.detach(), gradient

    return reference
