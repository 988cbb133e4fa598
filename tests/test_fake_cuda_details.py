"""Tests of the details of CUDA tensors without a GPU: see test_fake_cuda.py."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from paramstats._core import backend as backends
from tests import test_fake_cuda
from tests.test_fake_cuda import counts_since

fake, cuda = test_fake_cuda.fake, test_fake_cuda.cuda  # the fixtures


def zero_rows(tensors: list[torch.Tensor]) -> dict[int, list[int]]:
    """Read tensors and their gradients, all on one device; return the zero rows by table row."""
    _, deferred, transfers = backends.active().read(tensors, True, True)
    assert not deferred
    (transfer,) = transfers
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
        pytest.param(torch.zeros(3, 4), [0, 1, 2], id="all"),
        pytest.param(torch.ones(3, 4).tril(-1), [0], id="one"),
        pytest.param(torch.ones(4, 3).tril(-2).T, [2], id="transposed"),
        pytest.param(torch.zeros(1, 5).T, [0, 1, 2, 3, 4], id="a column"),
        pytest.param(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), [0, 1]),
        pytest.param(torch.tensor([1.0, 0.0, 2.0]), [1], id="one dimension"),
        pytest.param(torch.zeros(()), None, id="no dimension"),
        pytest.param(torch.eye(3), None, id="none"),
        pytest.param(torch.zeros(3, 0), None, id="empty"),
    ],
)
def test_layouts(cuda: Any, tensor: torch.Tensor, expected: list[int] | None) -> None:
    tensors = [cuda.to(tensor, 0), cuda.to(torch.ones(1), 0)]
    assert zero_rows(tensors).get(0) == expected
