"""Tests of the details of CUDA tensors without a GPU: see test_fake_cuda.py."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

import paramstats
from paramstats._core import backend as backends
from tests import test_fake_cuda
from tests.test_fake_cuda import counts_since

fake, cuda = test_fake_cuda.fake, test_fake_cuda.cuda  # the fixtures


def zero_rows(tensors: list[torch.Tensor]) -> dict[int, list[int]]:
    """Read tensors and their gradients, all on one device; return the zero rows by table row."""
    table, deferred, transfers, _ = backends.active().read(tensors, True, True)
    assert not deferred
    (transfer,) = transfers
    transfer.write(bytearray(table))
    found = {}
    for row, (distribution, rows, zeros) in transfer.details().items():
        assert distribution is None and rows is None and zeros is not None
        (n,) = struct.unpack_from("=q", zeros)
        assert len(zeros) == 8 + (n + 7) // 8
        found[row] = [r for r in range(n) if zeros[8 + r // 8] >> r % 8 & 1]
    return found


def test_zero_rows_of_tensors_and_gradients(cuda: Any) -> None:
    w, other = torch.randn(64, 40, device="cpu"), torch.randn(8, 2000, device="cpu")
    w[::3] = 0
    other[5] = -0.0
    grad = torch.ones(64, 40, device="cpu")
    grad[:40] = 0
    on_device, second = cuda.to(w, 0), cuda.to(other, 0)
    on_device.grad = cuda.to(grad, 0)
    before = cuda.counts()
    found = zero_rows([on_device, second])
    counts = counts_since(cuda, before)
    assert counts["launches"] == 2 and counts["copies"] == 0 and counts["waits"] == 1
    assert found == {0: [*range(0, 64, 3)], 1: [5], 2: [*range(40)]}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        pytest.param(torch.zeros(3, 4), None, id="all"),
        pytest.param(torch.ones(3, 4).tril(-1), [0], id="one"),
        pytest.param(torch.ones(4, 3).tril(-2).T, [2], id="transposed"),
        pytest.param(torch.tensor([[0.0, 1, 0, 0, 0]]).T, [0, 2, 3, 4], id="a column"),
        pytest.param(
            torch.eye(2, 60).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
            * torch.tensor([0, 1]).view(2, 1, 1, 1),
            [0],
        ),
        pytest.param(torch.tensor([1.0, 0.0, 2.0]), [1], id="one dimension"),
        pytest.param(torch.zeros(()), None, id="no dimension"),
        pytest.param(torch.eye(3), None, id="none"),
        pytest.param(torch.zeros(3, 0), None, id="empty"),
    ],
)
def test_layouts(cuda: Any, tensor: torch.Tensor, expected: list[int] | None) -> None:
    tensors = [cuda.to(tensor, 0), cuda.to(torch.ones(1), 0)]
    assert zero_rows(tensors).get(0) == expected


def test_too_many_rows(cuda: Any) -> None:
    x = torch.ones((1 << 20) + 1, dtype=torch.bool)
    x[7] = False
    assert paramstats.summarize({"x": cuda.to(x, 0)})["x"].zero_rows is None


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distributions_are_those_of_the_cpu(cuda: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (3 * torch.randn(300, 200, device="cpu")).to(dtype)
    expected = paramstats.summarize({"w": tensor}, distribution=True)["w"]
    before = cuda.counts()
    summary = paramstats.summarize({"w": cuda.to(tensor, 0)}, distribution=True)
    counts = counts_since(cuda, before)
    assert (counts["launches"], counts["copies"], counts["waits"]) == (4, 1, 0)
    found = summary["w"]
    for got, want in zip(found.histogram.to_numpy(), expected.histogram.to_numpy(), strict=True):
        assert got.tolist() == want.tolist()
    for format in (torch.float8_e4m3fn, torch.float8_e5m2):
        got, want = found.histogram, expected.histogram
        assert got.underflow(format, scale="mx") == want.underflow(format, scale="mx")
        assert got.overflow(format, scale="mx") == want.overflow(format, scale="mx")
    assert found.skewness == pytest.approx(expected.skewness, abs=2e-5, nan_ok=True)
    assert found.kurtosis == pytest.approx(expected.kurtosis, rel=2e-5, nan_ok=True)
    assert found.abs_mean == pytest.approx(expected.abs_mean, rel=1e-6)


def test_python_reads_rows(cuda: Any) -> None:
    """Torch operators do not run on the fake device: only what is deferred is tested."""
    x = cuda.to(torch.ones(4, 5, device="cpu"), 0)
    _, deferred, transfers, details = backends.active().read([x], True, True, details=b"\2")
    assert [row for row, _ in deferred] == [0] and not transfers and not details
