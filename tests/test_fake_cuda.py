"""Tests of `summarize` on CUDA tensors without a GPU.

tests/fake_cuda replaces CUDA. Enqueued work runs only when the program waits for it, and freed
memory is overwritten in stream order. test_cuda.py has what needs a real GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import pickle
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import paramstats
from paramstats._core import backend as backends
from paramstats._core import cuda as cuda_module
from paramstats._core import images, moments, reference, states, transfers
from tests import oracle
from tests.conftest import load_backend
from tests.dtypes import DTYPES
from tests.fake_cuda.building import FakeCuda
from tests.modes.conditions import CONDITIONS
from tools.accuracy import adversarial
from tools.accuracy.bound import assert_within, state_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fake devices would meet a real one"
)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    load_backend("native")
    if importlib.util.find_spec("ninja") is None:
        pytest.skip("ninja is not installed")
    return FakeCuda(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def cuda(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The runtime of the fake CUDA, with the native backend as if its CUDA module had loaded."""
    chosen = fake.install(load_backend("native"), monkeypatch.setattr)
    monkeypatch.setattr(backends, "_active", chosen)
    monkeypatch.setattr(cuda_module, "_unfinished", deque())  # without that of other tests
    yield fake.runtime
    for device in range(2):
        fake.runtime.use_stream(device, 0)
    fake.runtime.run()
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
        "launches": 1, "copies": 0, "waits": 0, "allocations": 2, "recorded": 0
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
    assert counts_since(cuda, before)["launches"] == 2 and counts_since(cuda, before)["waits"] == 0
    assert cuda.current_device() == 0
    assert list(summary) == [name for name, _ in expected.named_parameters()]
    for name, p in expected.named_parameters():
        oracle.check(summary[name], p)
    devices = [str(summary[f"{i}.weight"].device) for i in range(4)]
    assert devices == ["cuda:1", "cuda:0", "cpu", "cuda:1"]
    oracle.check(summary.total, torch.cat([p.detach().ravel() for p in expected.parameters()]))


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
    before = cuda.pinned()
    for _ in range(5):
        paramstats.summarize(model)
    kept = [paramstats.summarize(model) for _ in range(3)]
    del kept[1]
    gc.collect()
    assert cuda.pinned() == before + 8
    for summary in kept:
        check(summary, expected)
    assert kept[0] == kept[1]
    for _ in range(6):  # each drops the memory of two discarded summaries, and of itself
        assert paramstats.summarize(model).total.count == 75
    assert cuda.pinned() == before


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
    assert counts_since(cuda, before)["launches"] == 1
    for name, t in tensors.items():
        oracle.check(summary[name], t)


def test_only_tensors_with_gaps_are_deferred_to_torch_operators(cuda, monkeypatch):
    deferred = []
    monkeypatch.setattr(
        reference, "fill",
        lambda table, rows, *_: (deferred.extend(row for row, _ in rows), (table, (), {}, {}))[1],
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


def test_errors_of_the_driver_are_raised(cuda, model):
    to_cuda(model, cuda)
    paramstats.summarize(model).wait()
    cuda.before_launch(lambda: cuda.fail_next(719, 0))
    with pytest.raises(
        RuntimeError, match=r"summarize: cuda:0 reports cu.*: cudaErrorLaunchFailure"
    ):
        paramstats.summarize(model)
    assert paramstats.summarize(model).total.count == 75


def test_permanent_device_error(cuda, model):
    """E.g. a device assertion. Each use raises; what was dropped raises nothing, now or later."""
    to_cuda(model, cuda)
    read, dropped = paramstats.summarize(model), paramstats.summarize(model)
    cuda.fail(True)
    try:
        with pytest.raises(RuntimeError, match="CUDA error"):
            read.total.norm  # noqa: B018
        with pytest.raises(RuntimeError, match="CUDA error"):
            read.ready()
        del read, dropped
        gc.collect()
        with pytest.raises(RuntimeError, match="CUDA error"):
            paramstats.summarize(model)
    finally:
        cuda.fail(False)
    assert paramstats.summarize(model).total.count == 75


def test_a_failed_call_keeps_the_memory_that_the_device_may_write(cuda, model):
    to_cuda(model, cuda)
    paramstats.summarize(model).wait()
    before = cuda.pinned()
    cuda.before_launch(lambda: cuda.fail_next(719, 0))
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        paramstats.summarize(model)
    gc.collect()
    assert cuda.pinned() == before + 1
    cuda.run()
    for _ in range(2):
        paramstats.summarize(model).wait()
    assert cuda.pinned() == before


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


def test_another_thread_captures_a_graph(cuda, model):
    to_cuda(model, cuda)
    cuda.set_capturing(0, 3, True)
    summary = paramstats.summarize(model)
    invalidated = cuda.capture_invalidated()
    cuda.set_capturing(0, 3, False)
    assert not invalidated and summary.total.count == 75


def test_states_of_torch_operators(cuda, fake, monkeypatch):
    """They are computed on the CPU here; their transfer is the one of a GPU."""
    monkeypatch.setattr(transfers, "torch", fake.torch)
    before = cuda.pinned()
    tensors = [torch.arange(3.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    rows = [states.exact(x) for x in tensors]
    pending = transfers.Pending(torch.device("cuda", 0), [(1, 0), (0, 2)], rows)
    assert not pending.ready() and cuda.pinned() == before + 1
    table = bytearray(2 * moments.ROW.size)
    pending.write(table)
    assert pending.ready()
    assert moments.row(bytes(table), 1)[:2] == (3, 1) and moments.row(bytes(table), 0)[:2] == (6, 2)
    del pending
    gc.collect()
    assert cuda.pinned() == before


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


def not_found(*_: Any) -> str:
    return "no kernels"


def fails_to_load(*_: Any) -> images.Image:
    """The driver refuses the kernels."""
    return images.Image(b"", "a cubin")


def cannot_be_compiled(capability: tuple[int, int], wait: bool, shipped: bool) -> Any:
    return images.Image(b"", "a cubin") if shipped else "no NVRTC"


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("find", "reason"),
    [
        (not_found, "no kernels"),
        (
            fails_to_load,
            r"the kernels \(a cubin\) do not load: cuModuleLoadData: cudaErrorInvalidKernelImage",
        ),
        (cannot_be_compiled, r"\(a cubin\) do not load: .*; no NVRTC"),
    ],
)
def test_a_device_without_kernels(cuda, model, fake, monkeypatch, forced, find, reason):
    """Torch operators read its tensors, with one warning; or an error if native was forced."""
    chosen = fake.install(load_backend("native"), monkeypatch.setattr)
    monkeypatch.setattr(images, "find", find)
    monkeypatch.setattr(backends, "_active", dataclasses.replace(chosen, forced=forced))
    monkeypatch.setattr(backends, "_explained", set())
    deferred = {}
    monkeypatch.setattr(
        reference, "fill",
        lambda table, rows, params, flags: (deferred.update(rows), (table, (), {}, {}))[1],
    )  # fmt: skip
    to_cuda(model, cuda)
    if forced:
        with pytest.raises(RuntimeError, match=f"expected the native backend.*{reason}"):
            paramstats.summarize(model)
        return
    with pytest.warns(RuntimeWarning, match=f"torch operators on cuda:0.*{reason}"):
        paramstats.summarize(model)
    paramstats.summarize(model)  # a second warning would be an error
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    assert deferred == dict(enumerate(tensors))
    assert all(tensor is tensors[row] for row, tensor in deferred.items())


def test_the_kernels_are_compiled_if_the_driver_refuses_the_cubin(cuda, fake, monkeypatch):
    def find(capability: tuple[int, int], wait: bool, shipped: bool) -> images.Image:
        return images.Image(b"" if shipped else b"not empty", "a cubin" if shipped else "NVRTC")

    monkeypatch.setattr(images, "find", find)
    backend = cuda_module.CudaBackend(load_backend("native").native, fake.driver)
    assert backend.reason(0) == "" and backend.origin(0) == "NVRTC"


def test_the_reason_names_both_failures_if_the_second_one_is_later(cuda, fake, monkeypatch):
    """As `images.find`: once NVRTC was needed, each call returns what it made."""
    results = [images.Image(b"", "a cubin"), images.NotYet("being compiled"), "no NVRTC"]
    monkeypatch.setattr(images, "find", lambda *_: results.pop(0))
    backend = cuda_module.CudaBackend(load_backend("native").native, fake.driver)
    assert isinstance(backend.reason(0), images.NotYet)
    for _ in range(2):
        assert re.search(r"\(a cubin\) do not load: .*; no NVRTC$", backend.reason(0))


def test_each_call_while_the_kernels_are_loaded_may_fail(cuda, fake, monkeypatch):
    image = images.Image(b"not looked at", "the fake")
    monkeypatch.setattr(images, "find", lambda _, wait, shipped: image if shipped else "no NVRTC")
    native, skip = load_backend("native").native, 0
    while True:
        cuda.fail_next(700, skip)
        reason = cuda_module.CudaBackend(native, fake.driver).reason(0)
        if not reason:
            break
        assert re.search(
            r"\(the fake\) do not load: cu.*: cudaErrorIllegalAddress.*; no NVRTC", reason
        )
        skip += 1
    cuda.fail_next(0, 0)
    assert skip == 9  # of them five functions


def test_without_a_driver(cuda, fake, monkeypatch):
    backend = cuda_module.CudaBackend(load_backend("native").native, "no-such-library.so")
    assert "no-such-library.so" in backend.reason(0)


def test_torch_operators_read_while_the_kernels_are_compiled(cuda, model, fake, monkeypatch):
    expected = copies(model)
    chosen = fake.install(load_backend("native"), monkeypatch.setattr)
    monkeypatch.setattr(backends, "_active", dataclasses.replace(chosen, forced=False))
    find = images.find
    monkeypatch.setattr(images, "find", lambda *args: images.NotYet("being compiled"))
    deferred = []
    with monkeypatch.context() as patch:
        patch.setattr(
            reference, "fill",
            lambda table, rows, params, flags: (deferred.extend(rows), (table, (), {}, {}))[1],
        )  # fmt: skip
        paramstats.summarize(to_cuda(model, cuda))  # a warning would be an error
    assert len(deferred) == 8
    monkeypatch.setattr(images, "find", find)
    check(paramstats.summarize(model), expected)


def test_a_forced_native_backend_waits_until_the_kernels_are_compiled(cuda, model, monkeypatch):
    expected = copies(model)
    active, image = backends.active(), images.find((9, 0), True, True)
    extensions = backends._Extensions(active.native, None, active.cuda, None)
    monkeypatch.setattr(backends, "_extensions", extensions)
    monkeypatch.setattr(backends, "_active", backends.choose("native"))
    monkeypatch.setattr(
        images, "find",
        lambda capability, wait, shipped: image if wait else images.NotYet("being compiled"),
    )  # fmt: skip
    before = cuda.counts()
    check(paramstats.summarize(to_cuda(model, cuda)), expected)
    assert counts_since(cuda, before)["launches"] == 1


@pytest.mark.parametrize("moment", ["before the launch", "during the launch"])
@pytest.mark.parametrize("which", ["data", "gradient"])
def test_a_tensor_is_replaced(cuda, fake, monkeypatch, moment, which):
    """Another thread replaces it, and the memory that the kernels would read is used by others."""
    p = nn.Parameter(cuda.to(torch.ones(60), 0))
    p.grad = cuda.to(torch.ones(60), 0)
    paramstats.summarize([("p", p)]).wait()

    def replace(*_: Any) -> None:
        new = cuda.to(torch.full((60,), 3.0), 0)
        if which == "data":
            p.data = new
        else:
            p.grad = new
        cuda.run()

    if moment == "during the launch":
        cuda.before_launch(replace)
    else:
        empty = fake.torch.empty
        monkeypatch.setattr(fake.torch, "empty", lambda *args, **kwargs: (
            monkeypatch.setattr(fake.torch, "empty", empty), replace(), empty(*args, **kwargs))[2]
        )  # fmt: skip
    before = cuda.counts()
    entry = paramstats.summarize([("p", p)])["p"]
    stats = entry if which == "data" else entry.grad
    assert (stats.mean, stats.std) == (3, 0)
    launches = counts_since(cuda, before)["launches"]
    assert launches == (2 if moment == "during the launch" else 1)


def test_a_tensor_gets_another_dtype_at_the_same_address(cuda, fake, monkeypatch):
    x = cuda.to(torch.ones(60), 0)
    empty = fake.torch.empty

    def replace(*args: Any, **kwargs: Any) -> torch.Tensor:
        x.data = cuda.as_dtype(x, torch.bfloat16)
        monkeypatch.setattr(fake.torch, "empty", empty)
        return empty(*args, **kwargs)

    monkeypatch.setattr(fake.torch, "empty", replace)
    stats = paramstats.summarize({"x": x})["x"]
    assert (stats.count, stats.zero_count) == (60, 30)


def test_a_tensor_moves_to_the_cpu_before_it_is_recorded_on_a_stream(cuda, fake, monkeypatch):
    p = nn.Parameter(cuda.to(torch.ones(60), 0))
    current_stream = fake.torch.cuda.current_stream

    def replace(device: torch.device) -> Any:
        p.data = torch.full((60,), 3.0)
        return current_stream(device)

    cuda.use_stream(0, 1)
    monkeypatch.setattr(fake.torch.cuda, "current_stream", replace)
    before = cuda.counts()
    assert paramstats.summarize([("p", p)])["p"].mean == 3
    assert counts_since(cuda, before)["recorded"] == 0


def test_tensors_are_replaced_while_they_are_read(cuda):
    """Another thread replaces their data before the device is started, and while it is."""
    tensors = [nn.Parameter(torch.full((60,), 1.0)) for _ in range(8)]
    for p in tensors[::2]:
        p.data = cuda.to(p.data, 0)
    source = [(f"p{i}", p) for i, p in enumerate(tensors)]
    stop = threading.Event()

    def replace() -> None:
        number = 1.0
        while not stop.is_set():
            number = 3.0 - number
            for p in tensors:
                new = torch.full((3, 4, 5), number)
                p.data = cuda.to(new, 0) if p.is_cuda else new

    other = threading.Thread(target=replace)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(200):
            summary = paramstats.summarize(source)
            for name, _ in source:
                assert summary[name].mean in (1, 2) and summary[name].std == 0
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)
