"""The road of CUDA tensors from `summarize` to statistics, on devices that are not there.

tests/fake_cuda stands for CUDA where torch has none: work is queued and does not run before
somebody waits, memory that is let go becomes garbage in the order of its stream. What only a real
device shows is in test_cuda.py.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import linecache
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
from tests import oracle
from tests.conftest import load_backend
from tests.dtypes import DTYPES
from tests.fake_cuda import building
from tools.accuracy import adversarial
from tools.accuracy.bound import assert_within, state_of

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch has CUDA: nothing can stand in its place"
)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Any:
    native = load_backend("native").native
    if importlib.util.find_spec("ninja") is None:
        pytest.skip("ninja is not installed")
    return building.install(native, tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def cuda(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake, with the native backend as it is where the CUDA backend loads."""
    chosen = dataclasses.replace(load_backend("native"), cuda=extension, cuda_missing=None)
    monkeypatch.setattr(backends, "_active", chosen)
    yield extension
    for device in range(2):
        extension.use_stream(device, 0)
    extension.run()
    gc.collect()


def moved(model: nn.Module, cuda: Any, device: int = 0) -> nn.Module:
    """The model with its parameters, gradients and buffers on a fake device."""
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


def counted(cuda: Any, before: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in cuda.counts().items()}


def test_the_error_bound(cuda):
    @given(adversarial.tensors())
    @settings(max_examples=300)
    def holds(tensor):
        state = state_of(backends.active(), cuda.to(tensor.contiguous(), 0))
        assert_within("cuda", state, oracle.exact(tensor), tensor.dtype)

    holds()


def test_it_returns_before_the_device_is_done(cuda, model):
    on_cpu = copy.deepcopy(model)
    for p, q in zip(model.parameters(), on_cpu.parameters(), strict=True):
        q.grad = p.grad.clone()
    moved(model, cuda)
    before = cuda.counts()
    summary = paramstats.summarize(model)
    assert counted(cuda, before) == {
        "launches": 2, "copies": 2, "waits": 0, "allocations": 2, "recorded": 0
    }  # fmt: skip
    assert not summary.ready()
    assert counted(cuda, before)["waits"] == 0
    assert summary["0.weight"].device == torch.device("cuda:0")
    assert counted(cuda, before)["waits"] == 1 and summary.ready()
    for name, p in on_cpu.named_parameters():
        oracle.check(summary[name], p)
        oracle.check(summary[name].grad, p.grad)
    assert counted(cuda, before)["waits"] == 1


def test_ready_once_the_device_is_done(cuda, model):
    summary = paramstats.summarize(moved(model, cuda))
    cuda.run()
    assert summary.ready()


def test_two_devices_and_the_cpu_in_one_model(cuda):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5) for _ in range(4)]
    expected = nn.Sequential(*copy.deepcopy(layers))
    moved(layers[0], cuda, 1)
    moved(layers[1], cuda, 0)
    moved(layers[3], cuda, 1)
    before = cuda.counts()
    summary = paramstats.summarize(nn.Sequential(*layers))
    assert counted(cuda, before)["launches"] == 4 and counted(cuda, before)["waits"] == 0
    assert list(summary) == [name for name, _ in expected.named_parameters()]
    for name, p in expected.named_parameters():
        oracle.check(summary[name], p)
    devices = [str(summary[f"{i}.weight"].device) for i in range(4)]
    assert devices == ["cuda:1", "cuda:0", "cpu", "cuda:1"]
    oracle.check(summary.total, torch.cat([p.detach().ravel() for p in expected.parameters()]))


@pytest.mark.parametrize("stream", [0, 1])
def test_what_is_let_go_meanwhile_is_read_all_the_same(cuda, model, stream):
    """The model freed, gradients set to None, the stream changed: all before anything has run."""
    expected = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    moved(model, cuda)
    cuda.use_stream(0, stream)  # not, if 1, the one that the model was made on
    before = cuda.counts()
    summary = paramstats.summarize(model)
    assert counted(cuda, before)["recorded"] == (8 if stream else 0)
    cuda.use_stream(0, 2)
    for p in model.parameters():
        p.grad = None
    del model, p
    gc.collect()
    cuda.run()
    for name, (p, grad) in expected.items():
        oracle.check(summary[name], p)
        oracle.check(summary[name].grad, grad)


def test_summaries_in_flight_and_thrown_away(cuda, model):
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved(model, cuda)
    for _ in range(5):
        paramstats.summarize(model)  # nobody looks at it
    kept = [paramstats.summarize(model) for _ in range(3)]
    del kept[1]
    gc.collect()
    for summary in kept:
        for name, p in expected.items():
            oracle.check(summary[name], p)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("use", [pickle.dumps, str, lambda s: s.scalars(), lambda s: s.total])
def test_whatever_needs_figures_waits_for_them(cuda, model, use):
    summary = paramstats.summarize(moved(model, cuda))
    use(summary)
    assert summary.ready()


def test_every_type_by_one_launch(cuda):
    torch.manual_seed(0)
    tensors = {str(dtype): (7 * torch.randn(1000).abs()).to(dtype) for dtype in DTYPES}
    tensors |= {f"offset of {name}": t[3:] for name, t in tensors.items()}
    before = cuda.counts()
    summary = paramstats.summarize({name: cuda.to(t, 0) for name, t in tensors.items()})
    assert counted(cuda, before)["launches"] == 2
    for name, t in tensors.items():
        oracle.check(summary[name], t)


def test_layouts(cuda, monkeypatch):
    """Dense in any order of dimensions goes to the kernels; what has gaps to torch's operators."""
    left = []
    monkeypatch.setattr(
        paramstats._core.reference, "fill",
        lambda table, rows, params: (left.extend(row for row, _ in rows), (table, (), {}))[1],
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
    assert left == [5, 6]
    for name, t in dense.items():
        oracle.check(summary[name], t)


def test_buffers_and_sizes_alone(cuda):
    model = moved(nn.BatchNorm1d(7), cuda)
    summary = paramstats.summarize(model, buffers=True)
    assert summary["running_var"].mean == 1.0 and summary["num_batches_tracked"].count == 1
    before = cuda.counts()
    summary = paramstats.summarize(model, params=False, grads=False)
    assert counted(cuda, before)["launches"] == 0 and summary["weight"].count == 7


def test_a_scaled_gradient(cuda, model):
    expected = paramstats.summarize(model, grad_scale=8.0).total.grad.norm
    summary = paramstats.summarize(moved(model, cuda), grad_scale=8.0)
    assert summary.total.grad.norm == pytest.approx(expected, rel=1e-6)


def test_graph_capture_is_refused_untouched(cuda, model):
    moved(model, cuda)
    cuda.use_stream(0, 3)
    cuda.set_capturing(0, 3, True)
    before = cuda.counts()
    with pytest.raises(RuntimeError, match=r"expected no CUDA graph capture under way.*on cuda:0"):
        paramstats.summarize(model)
    touched = cuda.capture_touched()
    cuda.set_capturing(0, 3, False)
    assert not touched and not any(counted(cuda, before).values())
    assert paramstats.summarize(model).total.count == 75


def test_graph_capture_on_the_second_device_leaves_the_first_alone(cuda):
    model = nn.Sequential(moved(nn.Linear(2, 2), cuda, 0), moved(nn.Linear(2, 2), cuda, 1))
    cuda.use_stream(1, 3)
    cuda.set_capturing(1, 3, True)
    before = cuda.counts()
    with pytest.raises(RuntimeError, match="on cuda:1"):
        paramstats.summarize(model)
    cuda.set_capturing(1, 3, False)
    assert not any(counted(cuda, before).values())


@pytest.mark.parametrize(
    ("function", "error"), [("enqueue", "launch failure"), ("is_capturing", "implicit capture")]
)
def test_an_error_of_the_runtime_is_told(cuda, model, function, error):
    moved(model, cuda)
    cuda.fail(function)
    with pytest.raises(RuntimeError, match=f"the CUDA runtime reports '{error}' on cuda:0"):
        paramstats.summarize(model)
    cuda.fail("")
    assert paramstats.summarize(model).total.count == 75


def test_an_error_that_stays_ends_no_process(cuda, model):
    """After a device's assertion, say: whatever is freed then must raise nothing from destructors,
    where an exception would end the process before it has told of the assertion."""
    moved(model, cuda)
    read, dropped = paramstats.summarize(model), paramstats.summarize(model)
    cuda.fail("device")
    try:
        with pytest.raises(RuntimeError, match="CUDA error"):
            read.total.norm  # noqa: B018
        with pytest.raises(RuntimeError, match="CUDA error"):
            read.ready()
        del read, dropped
        gc.collect()
        assert not cuda.ended()
    finally:
        cuda.fail("")


def test_during_a_capture_earlier_summaries_are_read_and_freed(cuda, model):
    """Elsewhere, or here: asking their events must not spoil it, nor become a part of it."""
    moved(model, cuda)
    expected = paramstats.summarize(model).total.norm
    cuda.use_stream(0, 2)
    read, asked, dropped = (paramstats.summarize(model) for _ in range(3))
    cuda.set_capturing(0, 2, True)
    assert not asked.ready()
    assert read.total.norm == expected
    del dropped
    gc.collect()
    touched = cuda.capture_touched()
    cuda.set_capturing(0, 2, False)
    assert not touched and asked.total.norm == expected


def test_figures_wanted_by_two_threads(cuda, model):
    """The second waits and is done while the first stands before it reads what is pending."""
    arrived, go_on = threading.Event(), threading.Event()

    def trace(frame, event, _):
        if frame.f_code.co_name != "wait" or "paramstats" not in frame.f_code.co_filename:
            return None
        if "finished(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
            arrived.set()
            go_on.wait(10)
        return trace

    def first():
        sys.settrace(trace)
        found.append(summary.total.norm)

    found: list[float] = []
    summary = paramstats.summarize(moved(model, cuda))
    thread = threading.Thread(target=first)
    thread.start()
    assert arrived.wait(10)
    norm = summary.total.norm
    go_on.set()
    thread.join()
    assert norm > 0 and found == [norm] and summary.total.norm == norm


@pytest.mark.parametrize("forced", [False, True])
def test_a_device_that_the_kernels_were_not_compiled_for(cuda, model, monkeypatch, forced):
    """Its tensors go through torch operators, which say so once; or not at all."""
    chosen = dataclasses.replace(backends.active(), forced=forced)
    monkeypatch.setattr(backends, "_active", chosen)
    monkeypatch.setattr(backends, "_explained", set())
    monkeypatch.setattr(
        paramstats._core.reference, "fill", lambda table, rows, params: (table, (), {})
    )
    moved(model, cuda)
    cuda.fail("check")
    chosen.native.use_cuda_engine(cuda.api())  # which forgets what it knows of devices
    try:
        if forced:
            with pytest.raises(RuntimeError, match=r"expected the native engine.*no kernel image"):
                paramstats.summarize(model)
            return
        with pytest.warns(RuntimeWarning, match="torch operators on cuda:0.*no kernel image"):
            paramstats.summarize(model)
        paramstats.summarize(model)  # pytest makes a second warning an error
    finally:
        cuda.fail("")
        chosen.native.use_cuda_engine(cuda.api())


def test_the_current_device_is_left_as_it_was(cuda):
    model = moved(nn.Linear(2, 2), cuda, 1)
    paramstats.summarize(model).wait()
    assert cuda.to(torch.ones(2), 0).device == torch.device("cuda:0")


def test_an_engine_of_another_version_is_refused(cuda):
    native = backends.active().native
    with pytest.raises(ValueError, match=r"it is paramstats\.cuda\.Api/0, not "):
        native.use_cuda_engine(cuda.old_api())
    assert paramstats.summarize({"w": cuda.to(torch.ones(4), 0)})["w"].norm == 2.0


def test_tensors_of_the_cpu_while_a_device_is_started(cuda):
    """The GIL is let go for the device; another thread exchanges what the CPU is about to read."""
    here = [nn.Parameter(torch.full((3000,), 1.0)) for _ in range(50)]
    there = cuda.to(torch.ones(8), 0)
    source = [("there", there), *((f"p{i}", p) for i, p in enumerate(here))]
    stop = threading.Event()

    def exchange() -> None:
        number = 1.0
        while not stop.is_set():
            number = 3.0 - number
            for p in here:
                p.data = torch.full((5, 20, 30), number)

    other = threading.Thread(target=exchange)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(200):
            summary = paramstats.summarize(source)
            for i in range(len(here)):
                assert (summary[f"p{i}"].std, summary[f"p{i}"].count) == (0, 3000)
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)
