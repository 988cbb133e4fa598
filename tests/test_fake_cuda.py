"""Tests of `summarize` on CUDA tensors without a GPU.

tests/fake_cuda replaces CUDA for a torch without it. Enqueued work runs only when the program waits
for it, and freed memory is overwritten in stream order. test_cuda.py has what needs a real GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import paramstats
from paramstats._core import backend as backends
from paramstats._core import reference
from tests import oracle
from tests.conftest import load_backend
from tests.dtypes import DTYPES
from tests.fake_cuda import building
from tests.modes.conditions import CONDITIONS
from tools.accuracy import adversarial
from tools.accuracy.bound import assert_within, state_of

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch has CUDA, which the fake cannot replace"
)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Any:
    native = load_backend("native").native
    if importlib.util.find_spec("ninja") is None:
        pytest.skip("ninja is not installed")
    return building.install(native, tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def cuda(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake CUDA, with the native backend as if its CUDA module had loaded."""
    chosen = dataclasses.replace(load_backend("native"), cuda=extension, cuda_missing=None)
    monkeypatch.setattr(backends, "_active", chosen)
    yield extension
    for device in range(2):
        extension.use_stream(device, 0)
    extension.run()
    gc.collect()


def to_cuda(model: nn.Module, cuda: Any, device: int = 0) -> nn.Module:
    """Move the parameters, gradients and buffers of a model to a fake device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = nn.Parameter(cuda.to(p.detach(), device), requires_grad=p.requires_grad)
                if p.grad is not None:
                    new.grad = cuda.to(p.grad, device)
                module._parameters[name] = new
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = cuda.to(b, device)
    return model


Expected = dict[str, tuple[torch.Tensor, torch.Tensor]]


def copies(model: nn.Module) -> Expected:
    """Return `{name: (parameter, gradient)}`, copied."""
    return {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}


def check(summary: paramstats.Summary, expected: Expected) -> None:
    for name, (p, grad) in expected.items():
        oracle.check(summary[name], p)
        oracle.check(summary[name].grad, grad)


def counts_since(cuda: Any, before: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in cuda.counts().items()}


def test_error_bound(cuda):
    @given(adversarial.tensors())
    @settings(max_examples=300)
    def holds(tensor):
        state = state_of(backends.active(), cuda.to(tensor.contiguous(), 0))
        assert_within("cuda", state, oracle.exact(tensor), tensor.dtype)

    holds()


def test_summarize_returns_before_the_device_is_done(cuda, model):
    expected = copies(model)
    to_cuda(model, cuda)
    before = cuda.counts()
    summary = paramstats.summarize(model)
    assert counts_since(cuda, before) == {
        "launches": 2, "copies": 2, "waits": 0, "allocations": 2, "recorded": 0
    }  # fmt: skip
    assert not summary.ready()
    assert counts_since(cuda, before)["waits"] == 0
    assert summary["0.weight"].device == torch.device("cuda:0")
    assert counts_since(cuda, before)["waits"] == 1 and summary.ready()
    check(summary, expected)
    assert counts_since(cuda, before)["waits"] == 1
    other = paramstats.summarize(model)
    cuda.run()
    assert other.ready()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_mode_changes_no_result(cuda, model, condition):
    expected = copies(model)
    to_cuda(model, cuda)
    check(CONDITIONS[condition](lambda: paramstats.summarize(model).wait()), expected)


def test_two_devices_and_the_cpu_in_one_model(cuda):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5) for _ in range(4)]
    expected = nn.Sequential(*copy.deepcopy(layers))
    for layer, device in ((0, 1), (1, 0), (3, 1)):
        to_cuda(layers[layer], cuda, device)
    before = cuda.counts()
    summary = paramstats.summarize(nn.Sequential(*layers))
    assert counts_since(cuda, before)["launches"] == 4 and counts_since(cuda, before)["waits"] == 0
    assert list(summary) == [name for name, _ in expected.named_parameters()]
    for name, p in expected.named_parameters():
        oracle.check(summary[name], p)
    devices = [str(summary[f"{i}.weight"].device) for i in range(4)]
    assert devices == ["cuda:1", "cuda:0", "cpu", "cuda:1"]
    oracle.check(summary.total, torch.cat([p.detach().ravel() for p in expected.parameters()]))
    assert cuda.to(torch.ones(2), 0).device == torch.device(
        "cuda:0"
    )  # the current one is as before


@pytest.mark.parametrize("stream", [0, 1])
def test_tensors_freed_before_the_device_has_read_them(cuda, model, stream):
    """The model and its gradients are freed and the stream changes before any work has run."""
    expected = copies(model)
    to_cuda(model, cuda)
    cuda.use_stream(0, stream)  # the model was allocated on stream 0
    before = cuda.counts()
    summary = paramstats.summarize(model)
    assert counts_since(cuda, before)["recorded"] == (8 if stream else 0)
    cuda.use_stream(0, 2)
    for p in model.parameters():
        p.grad = None
    del model, p
    gc.collect()
    cuda.run()
    check(summary, expected)


def test_several_pending_and_discarded_summaries(cuda, model):
    expected = copies(model)
    to_cuda(model, cuda)
    for _ in range(5):
        paramstats.summarize(model)
    kept = [paramstats.summarize(model) for _ in range(3)]
    del kept[1]
    gc.collect()
    for summary in kept:
        check(summary, expected)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("use", [pickle.dumps, str, lambda s: s.scalars(), lambda s: s.total])
def test_every_use_of_statistics_waits_for_them(cuda, model, use):
    summary = paramstats.summarize(to_cuda(model, cuda))
    use(summary)
    assert summary.ready()


def test_all_dtypes_in_one_launch(cuda):
    torch.manual_seed(0)
    tensors = {str(dtype): (7 * torch.randn(1000).abs()).to(dtype) for dtype in DTYPES}
    tensors |= {f"offset of {name}": t[3:] for name, t in tensors.items()}
    before = cuda.counts()
    summary = paramstats.summarize({name: cuda.to(t, 0) for name, t in tensors.items()})
    assert counts_since(cuda, before)["launches"] == 2
    for name, t in tensors.items():
        oracle.check(summary[name], t)


def test_only_tensors_with_gaps_are_deferred_to_torch_operators(cuda, monkeypatch):
    deferred = []
    monkeypatch.setattr(
        reference, "fill",
        lambda table, rows, params: (deferred.extend(row for row, _ in rows), (table, (), {}))[1],
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 5)
    dense = {
        "plain": x,
        "transposed": x.transpose(0, 3),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "empty": x[:, :0],
        "scalar": torch.tensor(2.5),
    }
    gaps = {"slice": x[..., ::2], "expanded": x[:1].expand(4, 3, 4, 5)}
    summary = paramstats.summarize({n: cuda.to(t, 0) for n, t in (dense | gaps).items()})
    assert deferred == [5, 6]
    for name, t in dense.items():
        oracle.check(summary[name], t)


def test_buffers_and_sizes_alone(cuda):
    model = to_cuda(nn.BatchNorm1d(7), cuda)
    summary = paramstats.summarize(model, buffers=True)
    assert summary["running_var"].mean == 1.0 and summary["num_batches_tracked"].count == 1
    before = cuda.counts()
    summary = paramstats.summarize(model, params=False, grads=False)
    assert counts_since(cuda, before)["launches"] == 0 and summary["weight"].count == 7


def test_grad_scale(cuda, model):
    expected = paramstats.summarize(model, grad_scale=8.0).total.grad.norm
    summary = paramstats.summarize(to_cuda(model, cuda), grad_scale=8.0)
    assert summary.total.grad.norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("device", [0, 1])
def test_graph_capture_raises_and_stays_valid(cuda, device):
    """No device does any work, wherever the captured stream is."""
    model = nn.Sequential(*(to_cuda(nn.Linear(2, 2), cuda, d) for d in range(2)))
    cuda.use_stream(device, 3)
    cuda.set_capturing(device, 3, True)
    before = cuda.counts()
    message = f"expected no CUDA graph capture under way.*on cuda:{device}"
    with pytest.raises(RuntimeError, match=message):
        paramstats.summarize(model)
    invalidated = cuda.capture_invalidated()
    cuda.set_capturing(device, 3, False)
    assert not invalidated and not any(counts_since(cuda, before).values())
    assert paramstats.summarize(model).total.count == 12


@pytest.mark.parametrize(
    ("function", "error"), [("enqueue", "launch failure"), ("is_capturing", "implicit capture")]
)
def test_runtime_errors_are_raised(cuda, model, function, error):
    to_cuda(model, cuda)
    cuda.fail(function)
    with pytest.raises(RuntimeError, match=f"the CUDA runtime reports '{error}' on cuda:0"):
        paramstats.summarize(model)
    cuda.fail("")
    assert paramstats.summarize(model).total.count == 75


def test_permanent_device_error_does_not_end_the_process(cuda, model):
    """E.g. a device assertion. Summaries freed afterwards must not throw from destructors: that
    would end the process before it has reported the error."""
    to_cuda(model, cuda)
    read, dropped = paramstats.summarize(model), paramstats.summarize(model)
    cuda.fail("device")
    try:
        with pytest.raises(RuntimeError, match="CUDA error"):
            read.total.norm  # noqa: B018
        with pytest.raises(RuntimeError, match="CUDA error"):
            read.ready()
        del read, dropped
        gc.collect()
        assert not cuda.terminated()
    finally:
        cuda.fail("")


def test_earlier_summaries_can_be_read_and_freed_during_a_capture(cuda, model):
    to_cuda(model, cuda)
    expected = paramstats.summarize(model).total.norm
    cuda.use_stream(0, 2)
    read, queried, dropped = (paramstats.summarize(model) for _ in range(3))
    cuda.set_capturing(0, 2, True)
    assert not queried.ready()
    assert read.total.norm == expected
    del dropped
    gc.collect()
    invalidated = cuda.capture_invalidated()
    cuda.set_capturing(0, 2, False)
    assert not invalidated and queried.total.norm == expected


def test_two_threads_wait_for_one_summary(cuda, model, monkeypatch):
    """The second thread finishes while the first is about to read the transfers."""
    arrived, go_on = threading.Event(), threading.Event()
    finished = reference.finished

    def finished_late(*args):
        if threading.current_thread() is thread:
            arrived.set()
            go_on.wait(10)
        return finished(*args)

    monkeypatch.setattr(reference, "finished", finished_late)
    found: list[float] = []
    summary = paramstats.summarize(to_cuda(model, cuda))
    thread = threading.Thread(target=lambda: found.append(summary.total.norm))
    thread.start()
    assert arrived.wait(10)
    norm = summary.total.norm
    go_on.set()
    thread.join()
    assert norm > 0 and found == [norm] and summary.total.norm == norm


@pytest.mark.parametrize("forced", [False, True])
def test_device_that_the_kernels_were_not_compiled_for(cuda, model, monkeypatch, forced):
    """Torch operators read its tensors, with one warning; or an error if native was forced."""
    chosen = dataclasses.replace(backends.active(), forced=forced)
    monkeypatch.setattr(backends, "_active", chosen)
    monkeypatch.setattr(backends, "_explained", set())
    monkeypatch.setattr(reference, "fill", lambda table, rows, params: (table, (), {}))
    to_cuda(model, cuda)
    cuda.fail("check")
    chosen.native.use_cuda_backend(cuda.api())  # clears the errors of devices
    try:
        if forced:
            with pytest.raises(RuntimeError, match=r"expected the native backend.*no kernel image"):
                paramstats.summarize(model)
            return
        with pytest.warns(RuntimeWarning, match="torch operators on cuda:0.*no kernel image"):
            paramstats.summarize(model)
        paramstats.summarize(model)  # a second warning would be an error
    finally:
        cuda.fail("")
        chosen.native.use_cuda_backend(cuda.api())


def test_backend_of_another_version_is_refused(cuda):
    native = backends.active().native
    with pytest.raises(ValueError, match=r"Api/1, got paramstats\.cuda\.Api/0"):
        native.use_cuda_backend(cuda.old_api())
    assert paramstats.summarize({"w": cuda.to(torch.ones(4), 0)})["w"].norm == 2.0


def test_cpu_tensors_are_replaced_while_a_device_is_started(cuda):
    """Starting a device releases the GIL; another thread then replaces the data of CPU tensors."""
    on_cpu = [nn.Parameter(torch.full((3000,), 1.0)) for _ in range(50)]
    on_device = cuda.to(torch.ones(8), 0)
    source = [("cuda", on_device), *((f"p{i}", p) for i, p in enumerate(on_cpu))]
    stop = threading.Event()

    def replace() -> None:
        number = 1.0
        while not stop.is_set():
            number = 3.0 - number
            for p in on_cpu:
                p.data = torch.full((5, 20, 30), number)

    other = threading.Thread(target=replace)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(200):
            summary = paramstats.summarize(source)
            for i in range(len(on_cpu)):
                assert (summary[f"p{i}"].std, summary[f"p{i}"].count) == (0, 3000)
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)
