"""A call changes nothing: no value, version counter, autograd history or mode."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import paramstats

MODES = [contextlib.nullcontext, torch.no_grad, torch.enable_grad, torch.inference_mode]


def state(tensors):
    return [
        (t.data_ptr(), t._version if not t.is_inference() else None, t.grad_fn, t.requires_grad)
        for t in tensors
    ]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.__name__)
def test_a_call_changes_no_tensor(backend, model, mode):
    embedding = torch.nn.Embedding(20, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    inner = model[0].weight * 2
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), inner]
    copies = [t.detach().clone() for t in tensors]
    before = state(tensors)
    with mode():
        grad_mode = torch.is_grad_enabled()
        summary = paramstats.summarize(
            [*model.named_parameters(), ("inner", inner), ("sparse", embedding.weight)]
        )
        assert torch.is_grad_enabled() == grad_mode
    assert summary["inner"].norm > 0
    assert state(tensors) == before
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert not embedding.weight.grad.is_coalesced()
    inner.sum().backward()


def test_a_failing_call_changes_no_tensor(backend, model):
    before = state(model.parameters())
    with pytest.raises(TypeError):
        paramstats.summarize([*model.named_parameters(), ("bad", 3)])
    assert state(model.parameters()) == before


def test_inference_tensors_are_read(backend):
    with torch.inference_mode():
        x = torch.ones(5)
    assert paramstats.summarize({"x": x})["x"].mean == 1.0


def test_a_copy_on_write_tensor_is_not_copied(native):
    x = torch.randn(1000)
    lazy = torch._lazy_clone(x)
    assert paramstats.summarize({"x": lazy})["x"].count == 1000
    assert torch._C._is_cow_tensor(lazy)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_call_on_a_gigabyte_needs_no_memory(native):
    """Measures the peak of resident memory, in a separate process."""
    code = """
import re, torch, paramstats
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
tensors = {str(i): torch.ones(125_000_000 // 4) for i in range(8)}
paramstats.summarize({"warm": torch.ones(2_000_000)})
before = peak()
assert paramstats.summarize(tensors).total.count == 250_000_000
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 10_000, "kB"


class SummarizesItself(torch.nn.Module):
    """A model that calls summarize in `forward`."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(40, 30)
        self.scale = torch.nn.Parameter(torch.randn(30, dtype=torch.cfloat))
        self.active = True
        self.summaries = []

    def forward(self, x):
        if self.active:
            self.summaries.append(paramstats.summarize(self))
        return self.layer(x) * self.scale.abs()


def nodes_of_jit_trace(model, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nodes = list(torch.jit.trace(model, x, check_trace=False).graph.nodes())
    deprecated = (DeprecationWarning, FutureWarning)  # torch.jit.trace is deprecated
    assert [w for w in caught if not issubclass(w.category, deprecated)] == []
    return len(nodes)


def nodes_of_make_fx(model, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return [node.target for node in make_fx(lambda x: model(x))(x).graph.nodes]


class CountingDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators_in_a_dispatch_mode(model, x):
    with CountingDispatch() as mode:
        model(x)
    return mode.count


def nothing_in_a_fake_tensor_mode(model, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model(x)


@pytest.mark.parametrize(
    "observe",
    [
        nodes_of_jit_trace,
        nodes_of_make_fx,
        operators_in_a_dispatch_mode,
        nothing_in_a_fake_tensor_mode,
    ],
)
def test_tracers_and_dispatch_modes_see_no_operator_of_a_call(backend, observe):
    model, x = SummarizesItself(), torch.randn(2, 40)
    observed = observe(model, x)
    assert model.summaries and not model.summaries[0].skipped
    assert model.summaries[0] == paramstats.summarize(model)
    model.active = False
    assert observe(model, x) == observed


class Doubling(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        out = func(*args, **(kwargs or {}))
        return 2 * out if type(out) is torch.Tensor and out.is_floating_point() else out


class ReadableByFunction(torch.Tensor):
    """A subclass whose elements only its `__torch_function__` gives."""

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.dequantize:
            return args[0].inner
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func}")


def test_function_modes_neither_see_nor_change_a_call(backend, model):
    model[0].weight.grad = torch.ones(6, 8).to_sparse()
    others = {
        "x": torch.ones(3),
        "complex": torch.ones(3, dtype=torch.cfloat),
        "own": ReadableByFunction(torch.ones(3)),
    }
    expected = paramstats.summarize(others)
    assert not expected.skipped
    with Doubling() as outer, torch.device("meta"), Doubling() as inner:
        outer.count = 0  # it saw torch.device
        summaries = [paramstats.summarize(model), paramstats.summarize(others)]
        counts = outer.count, inner.count
        assert torch.empty(1).is_meta
    assert counts == (0, 0) and outer.count and inner.count, "the modes are active again"
    assert summaries == [paramstats.summarize(model), expected]


PRIVATE = [
    "_C._get_tracing_state",
    "_C._set_tracing_state",
    "_C._len_torch_function_stack",
    "overrides._pop_mode_temporarily",
    "_C._len_torch_dispatch_stack",
    "utils._python_dispatch._disable_current_modes",
    "_C._functorch.is_gradtrackingtensor",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_batchedtensor",
    "_C._functorch",
]


class PassThrough(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", ["removed", "other arguments"])
@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_private_name_of_torch_a_call_still_works(backend, monkeypatch, name, change):
    tensors = {"x": torch.ones(3), "complex": torch.ones(3, dtype=torch.cfloat)}
    place, _, last = f"torch.{name}".rpartition(".")
    place = functools.reduce(getattr, place.split(".")[1:], torch)
    with PassThrough(), CountingDispatch(), monkeypatch.context() as patch:
        if change == "removed":
            patch.delattr(place, last)
        else:
            patch.setattr(place, last, lambda one, two, three: None)
        summary = paramstats.summarize(tensors)
    assert [entry.mean for entry in summary.values()] == [1.0, 1.0] and not summary.skipped


def test_without_all_private_names_of_torch_a_call_still_works():
    names = [*PRIVATE, "_C._dynamo.eval_frame.set_code_exec_strategy"]
    code = f"""
import torch, torch._dynamo  # it needs the private names itself
for name in {names}:
    exec(f"del torch.{{name}}")
import paramstats
from paramstats._core import backend as backends
tensors = {{"x": torch.ones(3), "complex": torch.ones(3, dtype=torch.cfloat)}}
for name in ("reference", {paramstats._core.backend.choose(None).name!r}):
    backends._active = backends.choose(name)
    summary = paramstats.summarize(tensors)
    assert [entry.mean for entry in summary.values()] == [1.0, 1.0] and not summary.skipped
"""
    subprocess.run([sys.executable, "-c", code], check=True)
