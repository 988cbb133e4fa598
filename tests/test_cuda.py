"""Tests that need a GPU. `make gpu-check` runs them; they are skipped elsewhere.

test_fake_cuda.py tests `summarize` on CUDA tensors without a GPU, tests/cpp/test_cuda_kernels.cpp
tests the kernels.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from paramstats._core import backend as backends
from tests import oracle
from tests.conftest import load_backend
from tests.dtypes import DTYPES
from tests.modes.conditions import CONDITIONS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture
def cuda_backend(monkeypatch: pytest.MonkeyPatch) -> backends.Implementation:
    """The native backend; its CUDA backend must run, too."""
    chosen = load_backend("native")
    assert chosen.cuda is not None, chosen.cuda_missing
    reason = chosen.cuda.reason(torch.cuda.current_device(), wait=True)
    assert not reason, reason
    monkeypatch.setattr(backends, "_active", chosen)
    return chosen


def check(summary: paramstats.Summary, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        oracle.check(summary[name], tensor.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_size_and_address(cuda_backend, dtype):
    torch.manual_seed(0)
    whole = (7 * torch.randn(300_000)).abs().to(dtype).cuda()
    sizes = (0, 1, 2, 15, 16, 17, 31, 33, 127, 129, 16384, 32768 + 1, 131072 - 1, 131072 + 13)
    tensors = {
        f"{n}+{first}": whole[first : first + n] for n in sizes for first in (0, 1, 2, 3, 5, 15)
    }
    check(paramstats.summarize(tensors), tensors)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
    ids=str,
)
def test_every_pattern_of_8_and_16_bits(cuda_backend, dtype):
    """Conversions on the device differ from those of the CUDA shim on the CPU."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int8
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    x = torch.arange(low, high + 1, dtype=torch.int32).to(bits).view(dtype)
    blocks = {str(i): part.cuda() for i, part in enumerate(x.split(16))}
    check(paramstats.summarize(blocks), blocks)


DIFFICULT_VALUES = {
    "1000 + 0.02 N": lambda n: 1000 + 0.02 * torch.randn(n),
    "1 + 1e-4 N": lambda n: 1 + 1e-4 * torch.randn(n),
    "constant": lambda n: torch.full((n,), 0.1),
    "1e30 N": lambda n: 1e30 * torch.randn(n),
    "1e-30 N": lambda n: 1e-30 * torch.randn(n),
    "subnormals": lambda n: 1e-40 * torch.randn(n),
    "one 1e6": lambda n: (1e-6 * torch.randn(n)).index_fill_(0, torch.tensor([n // 3]), 1e6),
    "one NaN": lambda n: torch.randn(n).index_fill_(0, torch.tensor([n // 3]), torch.nan),
    "infinities": lambda n: torch.randn(n).index_fill_(0, torch.tensor([5, n - 1]), -torch.inf),
    "all NaN": lambda n: torch.full((n,), torch.nan),
    "zeros": lambda n: torch.zeros(n),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_difficult_values(cuda_backend, dtype):
    torch.manual_seed(0)
    tensors = {name: make(100_003).to(dtype).cuda() for name, make in DIFFICULT_VALUES.items()}
    check(paramstats.summarize(tensors), tensors)


def test_more_than_2_to_the_31_elements(cuda_backend):
    free, _ = torch.cuda.mem_get_info()
    if free < 3 << 30:
        pytest.skip("needs 3 GiB of GPU memory")
    x = torch.ones(2**31 + 9, dtype=torch.int8, device="cuda")
    x[-1] = 3
    stats = paramstats.summarize({"x": x})["x"]
    assert (stats.count, stats.max, stats.min) == (2**31 + 9, 3.0, 1.0)
    assert stats.mean == pytest.approx(1 + 2 / (2**31 + 9), rel=1e-12)


def test_layouts_and_tensors_that_torch_operators_read(cuda_backend):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 10, device="cuda")
    tensors = {
        "plain": x,
        "transposed": x.transpose(0, 3),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "slice": x[..., ::2],
        "expanded": x[:1].expand(4, 6, 8, 10),
        "scalar": torch.tensor(2.5, device="cuda"),
    }
    check(paramstats.summarize(tensors), tensors)
    complex_ = torch.randn(100, dtype=torch.complex64, device="cuda")
    sparse = torch.eye(5, device="cuda").to_sparse()
    summary = paramstats.summarize({"complex": complex_, "sparse": sparse})
    assert summary["complex"].norm == pytest.approx(complex_.norm().item(), rel=1e-5)
    assert summary["sparse"].zero_count == 20


def keep_busy(milliseconds: float) -> None:
    """Keep the current stream busy for about this time."""
    torch.cuda._sleep(int(milliseconds * 1e6))


def test_summarize_does_not_wait(cuda_backend, model):
    model.cuda()
    model(torch.randn(4, 8, device="cuda")).sum().backward()
    expected = paramstats.summarize(model).scalars()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_busy(200)
        summary = paramstats.summarize(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not summary.ready()
    assert summary.scalars() == expected and summary.ready()


def test_launches_and_synchronizations_in_the_profiler(cuda_backend, model):
    model.cuda()
    model(torch.randn(4, 8, device="cuda")).sum().backward()
    for _ in range(3):
        paramstats.summarize(model).wait()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        summary = paramstats.summarize(model)
    names = [event.name for event in profile.events()]
    launches = sum(name.startswith("cuLaunchKernel") for name in names)
    others = {name for name in names if name.startswith("cudaLaunchKernel")}  # torch's
    waits = {
        name
        for name in names
        if re.match("cuda.*Synchronize|cudaMemcpy$|cudaMalloc|cudaHostAlloc|cudaFree", name)
    }
    # The profiler itself synchronizes when it ends. It shows no other calls of the driver's API.
    assert 1 <= launches <= 2 and not others and waits <= {"cudaDeviceSynchronize"}, names
    assert summary.total.count == 75


@pytest.mark.parametrize("side", [False, True])
def test_tensors_freed_before_the_device_has_read_them(cuda_backend, side):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    model(torch.randn(2, 512)).sum().backward()
    expected = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    model.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        keep_busy(200)
        summary = paramstats.summarize(model)
    for p in model.parameters():
        p.grad = None
    del model, p
    gc.collect()
    garbage = [torch.full((512, 512), 7.0, device="cuda") for _ in range(32)]
    for name, (p, grad) in expected.items():
        oracle.check(summary[name], p)
        oracle.check(summary[name].grad, grad)
    assert garbage


def test_ten_runs_give_the_same_bits(cuda_backend):
    torch.manual_seed(0)
    tensors = {str(d): (9 * torch.randn(1_000_003)).to(d).cuda() for d in DTYPES}
    first = pickle.dumps(paramstats.summarize(tensors))
    for _ in range(9):
        assert pickle.dumps(paramstats.summarize(tensors)) == first
    alone = {name: paramstats.summarize({name: t})[name] for name, t in tensors.items()}
    assert all(pickle.loads(first)[name] == stats for name, stats in alone.items())


def test_cpu_and_gpu_in_one_model(cuda_backend, model):
    on_cpu = copy.deepcopy(model)
    model[0].cuda()
    summary = paramstats.summarize(model)
    check(summary, dict(on_cpu.named_parameters()))
    assert [str(entry.device) for entry in summary.values()] == ["cuda:0", "cuda:0", "cpu", "cpu"]


def test_two_gpus(cuda_backend, model):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    expected = copy.deepcopy(model)
    model[0].cuda(1)
    model[2].cuda(0)
    check(paramstats.summarize(model), dict(expected.named_parameters()))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_mode_changes_no_result(cuda_backend, model, condition):
    """Tensors for the results and the workspace are made, which no mode may see or change."""
    model.cuda()
    expected = paramstats.summarize(model).scalars()
    assert CONDITIONS[condition](lambda: paramstats.summarize(model).scalars()) == expected


@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_graph_capture_raises_and_stays_valid(cuda_backend, model, monkeypatch, backend_name):
    monkeypatch.setattr(backends, "_active", load_backend(backend_name))
    model.cuda()
    paramstats.summarize(model).wait()
    x = torch.ones(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x
        with pytest.raises(RuntimeError, match="expected no CUDA graph capture under way"):
            paramstats.summarize(model)
        y += 1
    x.fill_(5.0)
    graph.replay()
    assert y.tolist() == [11.0] * 8
    assert paramstats.summarize(model).total.count == 75


def run_in_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=120,
    )


def test_first_call_inside_a_capture(cuda_backend):
    done = run_in_process("""
        import torch, paramstats
        model, x = torch.nn.Linear(4, 4).cuda(), torch.ones(8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = 2 * x
            try:
                paramstats.summarize(model)
            except RuntimeError as error:
                print("refused" if "graph capture" in str(error) else error)
        graph.replay()
        print(y.sum().item(), paramstats.summarize(model).total.count, paramstats.backend().cuda)
    """)
    assert done.stdout.split() == ["refused", "16.0", "20", "native"], done.stderr


def test_earlier_summaries_can_be_read_and_freed_during_a_capture(cuda_backend, model):
    model.cuda()
    expected = paramstats.summarize(model).total.norm
    x = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    read, queried, dropped = (paramstats.summarize(model) for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x
        queried.ready()
        assert read.total.norm == expected
        del dropped
        gc.collect()
    graph.replay()
    assert y.sum().item() == 16.0 and queried.total.norm == expected


def test_device_assertion_does_not_end_the_process(cuda_backend):
    """Summaries freed after the error must not end the process before its traceback."""
    done = run_in_process("""
        import torch, paramstats
        model = torch.nn.Linear(4, 4).cuda()
        kept, dropped = paramstats.summarize(model), paramstats.summarize(model)
        last = None
        torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]
        try:
            last = paramstats.summarize(model)  # raises if the assertion has failed by now
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("raised", "assert" in str(error))
        del dropped, last
        print("alive", flush=True)
    """)
    assert done.stdout.split()[:3] == ["raised", "True", "alive"], done.stderr
    assert done.returncode >= 0, done.stderr  # no signal


def test_two_threads(cuda_backend, model):
    model.cuda()
    expected = paramstats.summarize(model).scalars()
    found: list[Any] = []

    def summarize() -> None:
        for _ in range(200):
            found.append(paramstats.summarize(model).scalars())

    threads = [threading.Thread(target=summarize) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(scalars == expected for scalars in found)


def test_discarded_summaries_and_an_emptied_cache(cuda_backend, model):
    model.cuda()
    expected = paramstats.summarize(model).total.norm
    keep_busy(50)
    for _ in range(50):
        paramstats.summarize(model)
    summary = paramstats.summarize(model)
    torch.cuda.empty_cache()
    assert summary.total.norm == expected


def test_reference_backend_agrees(cuda_backend, model, monkeypatch):
    model.cuda()
    model(torch.randn(4, 8, device="cuda")).sum().backward()
    native = paramstats.summarize(model).scalars()
    monkeypatch.setattr(backends, "_active", load_backend("reference"))
    assert paramstats.summarize(model).scalars() == pytest.approx(native, rel=1e-6, abs=1e-6)


def test_in_a_compiled_step(cuda_backend, model):
    model.cuda()

    @torch.compile
    def step(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return model(x).square().mean(), paramstats.summarize(model)

    for _ in range(3):
        loss, summary = step(torch.randn(4, 8, device="cuda"))
        loss.backward()
        assert summary.total.norm == paramstats.summarize(model).total.norm
