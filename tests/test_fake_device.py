"""Tests of the fake CUDA device, with which `python -m benches.gpu_check --dry-run` works."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA's own functions"),
    pytest.mark.skipif(importlib.util.find_spec("ninja") is None, reason="ninja is not installed"),
]


def run(*arguments: str) -> str:
    """Run Python on the fake device and return its output. The first call compiles the device."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_device", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tensors_streams_events_and_graphs():
    code = """
        import torch
        assert torch.cuda.get_device_name() == "fake device (dry run)"
        x = torch.arange(6.0, device="cuda:1").view(2, 3)
        assert (x.device.index, x.t().is_contiguous(), x[1].sum().item()) == (1, False, 12.0)
        x.t()[0] = torch.tensor([7.0, 8.0])  # in place, through a view
        x.resize_(3, 3)[2].fill_(1)
        assert x.cpu().tolist() == [[7, 1, 2], [8, 4, 5], [1, 1, 1]]
        weight = torch.ones(3, device="cuda", requires_grad=True)
        (2 * weight).sum().backward()
        assert weight.grad.is_cuda and weight.grad.tolist() == [2, 2, 2]
        sparse = torch.eye(3, device="cuda").to_sparse()
        assert sparse.is_cuda and sparse.coalesce().values().sum().item() == 3

        begin, end = torch.cuda.Event(), torch.cuda.Event()
        begin.record()
        torch.cuda._sleep(50_000_000)
        end.record()
        assert not end.query() and begin.elapsed_time(end) >= 50
        with torch.cuda.stream(torch.cuda.Stream()):  # which is free
            torch.cuda.set_sync_debug_mode("error")
            pinned = torch.ones(3, pin_memory=True)
            on_device = pinned.to("cuda", non_blocking=True)
            try:
                on_device.sum().item()
            except RuntimeError as error:
                assert "synchronizing" in str(error)
            else:
                raise AssertionError("item() waits")
            torch.cuda.set_sync_debug_mode("default")
        end.synchronize()
        assert end.query()

        graph, x = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda")
        with torch.cuda.graph(graph):
            y = 2 * x
        x.fill_(5)
        graph.replay()
        assert y.tolist() == [10, 10, 10]

        torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("assertion" if "assert" in str(error) else error)
    """
    assert run("-c", textwrap.dedent(code)) == "assertion\n"


def test_measurements_of_the_gpu_check_run_and_are_marked(tmp_path):
    shutil.rmtree(ROOT / "build/fake_device/cache", ignore_errors=True)  # kernels of earlier runs
    path = tmp_path / "smoke.json"
    output = run("-m", "benches.on_gpu", "--only", "smoke", "--json", str(path))
    assert "calls gave the same bits, launches " in output
    assert "native (" in output and '"dry_run": true' in path.read_text()
