"""Collective calls under any mode of torch: the same results as outside, and no mode sees them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import paramstats
from tests import oracle
from tests.modes.conditions import CONDITIONS, FEW
from tests.sharded.ranks import on_ranks


@pytest.mark.parametrize("condition", FEW)
@pytest.mark.parametrize("options", [{}, {"async_op": True}], ids=["sync", "async"])
@on_ranks(3)
def test_a_mode_changes_no_result(options, condition):
    rank = dist.get_rank()
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 1e-39
    shard = paramstats.LocalShard(values.chunk(3)[rank], rank, values.numel(), values.shape)
    mesh = init_device_mesh("cpu", (3,))
    tensors = {
        "w": shard,
        "sum": DTensor.from_local(values, mesh, [Partial()]),
        f"only on rank {rank}": torch.full((3,), float(rank)),  # the ranks must agree
        f"{condition} {options}": torch.ones(2),  # anew in each test
    }

    summary = CONDITIONS[condition](lambda: paramstats.summarize(tensors, **options).wait())

    oracle.check(summary["w"], values)
    oracle.check(summary["sum"], 3 * values)
    assert [summary[f"only on rank {other}"].mean for other in range(3)] == [0.0, 1.0, 2.0]
