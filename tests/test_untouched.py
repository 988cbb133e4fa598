"""A call changes nothing: no value, version counter, autograd history or mode."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch

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
