"""Partial tensors are reduced before their statistics are computed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._ops._embedding_ops import _MaskPartial
from torch.distributed.tensor._ops._math_ops import _NormPartial

import paramstats
from paramstats._sharded.partial import PartialSpec, Reduction, make_plan
from tests.sharded.models import check_same_on_all_ranks, messages_of
from tests.sharded.ranks import on_ranks


def _replicated(n: int, mesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.zeros(n), mesh, [Replicate()]))


@on_ranks(2)
def test_operators_and_dtypes():
    """The value of each rank, and what they are reduced to; None: this rank has no gradient."""
    mesh = init_device_mesh("cpu", (2,))
    for op, dtype, values, expected in (
        ("sum", torch.float64, (1, 2), 3),
        ("sum", torch.bfloat16, (1, 2), 3),
        ("sum", torch.float8_e5m2, (1, 2), 3),
        ("sum", torch.int16, (1, 2), 3),
        ("sum", torch.uint8, (1, 2), 3),
        ("avg", torch.float32, (1, 2), 1.5),
        ("product", torch.float32, (2, 3), 6),
        ("max", torch.bool, (0, 1), 1),
        ("min", torch.bfloat16, (5, -1), -1),
        ("sum", torch.float32, (5, None), 5),
        ("product", torch.float32, (3, None), 3),
        ("max", torch.float32, (-1, None), -1),
        ("max", torch.int32, (-1, None), -1),
        ("min", torch.float32, (4, None), 4),
    ):
        p = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]).to(dtype), False)
        value = values[dist.get_rank()]
        if value is not None:
            local = torch.full((3,), value).to(dtype)
            p.grad = DTensor.from_local(local, mesh, [Partial(op)])
        for async_op in (False, True):
            summary = paramstats.summarize({"p": p}, async_op=async_op)
            assert summary["p"].grad.mean == expected, (op, dtype)
            assert list(summary.diverged) == ["p (gradient)"] * (None in values)


@on_ranks(2)
def test_ranks_follow_gradients_and_models_that_change():
    """What is reduced follows from the specs of each call, not from those of earlier calls."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    p, q, other = (_replicated(n, mesh) for n in (6, 2, 3))
    partial = DTensor.from_local(torch.full((6,), 1.0 + rank), mesh, [Partial()])
    whole = DTensor.from_local(torch.full((6,), 7.0), mesh, [Replicate()])

    for grads, q_is_frozen, expected in (
        ((None, None), False, None),
        ((partial, partial), False, (3.0, [])),
        ((None, None), False, None),
        ((partial, partial), False, (3.0, [])),
        ((partial, None), False, (1.0, ["p (gradient)"])),
        ((whole, whole), False, (7.0, [])),
        ((partial, partial), rank == 1, (3.0, [])),
        ((None, None), rank == 1, None),
        ((None, None), False, None),
        ((partial, partial), False, (3.0, [])),
    ):
        p.grad = grads[rank]
        q.requires_grad_(not q_is_frozen)
        assert paramstats.summarize({"other": other})["other"].count == 3
        summary = paramstats.summarize({"p": p, "q": q})
        grad = summary["p"].grad
        assert expected == (None if grad is None else (grad.mean, sorted(summary.diverged)))


@on_ranks(4)
def test_same_names_on_another_mesh():
    rank = dist.get_rank()
    for ranks in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]) * 2:
        mesh = DeviceMesh("cpu", ranks)
        x = DTensor.from_local(torch.full((4,), float(rank)), mesh, [Shard(0), Partial()])
        summary = paramstats.summarize({"x": x})
        assert summary["x"].mean == x.full_tensor().mean() and not summary.diverged


@on_ranks(2)
def test_bad_value_on_one_rank_raises_on_all():
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for bad in (torch.eye(3).to_sparse(), torch.ones(3, 3, device="meta")):
        x = DTensor.from_local(torch.eye(3), mesh, [Partial()])
        if rank == 1:
            x._local_tensor = bad
        messages = messages_of(lambda x=x: paramstats.summarize({"x": x}))
        assert len(messages) == 2 and any("an error on rank 1" in m for m in messages)
    x = DTensor.from_local(torch.ones(3), mesh, [Partial("max" if rank else "sum")])
    (message,) = messages_of(lambda: paramstats.summarize({"x": x}))
    assert "'x' to have one operator and dtype" in message
    assert paramstats.summarize({"x": torch.ones(3)}, group=dist.group.WORLD)["x"].mean == 1


@on_ranks(2)
def test_tensors_that_cannot_be_reduced_are_skipped_with_a_reason():
    mesh = init_device_mesh("cpu", (2,))
    source = {
        "complex": DTensor.from_local(torch.ones(3, dtype=torch.complex64), mesh, [Partial()]),
        "counts": DTensor.from_local(torch.ones(3, dtype=torch.int32), mesh, [Partial("avg")]),
        "shards": distribute_tensor(torch.ones(4, dtype=torch.complex64), mesh, [Shard(0)]),
        "fine": DTensor.from_local(torch.ones(3), mesh, [Partial()]),
    }
    summary = paramstats.summarize(source)
    assert list(summary.skipped) == ["complex", "counts", "shards"]
    assert "complex64" in summary.skipped["complex"] and "int32" in summary.skipped["counts"]
    assert summary["fine"].mean == 2.0
    for odd in (_NormPartial(2.0), _MaskPartial(offset_shape=torch.Size([3]), offset_dim=0)):
        x = DTensor.from_local(torch.ones(3), mesh, [odd])
        assert type(odd).__name__ in paramstats.summarize({"x": x}).skipped["x"]


@on_ranks(4)
def test_each_row_of_a_mesh_reduces_on_its_own():
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    p = _replicated(5, mesh["tp"])
    p.grad = DTensor.from_local(torch.full((5,), 1.0 + rank % 2), mesh["tp"], [Partial()])
    summary = paramstats.summarize({"p": p})
    assert summary["p"].grad.mean == 3.0 and not summary.diverged
    x = DTensor.from_local(torch.full((2,), 1.0 + rank), mesh, [Shard(0), Partial("avg")])
    summary = paramstats.summarize({"x": x, "p": p}, group=dist.group.WORLD)
    assert (summary["x"].min, summary["x"].max, summary["x"].count) == (1.5, 3.5, 4)
    y = DTensor.from_local(torch.full((2,), 1.0 + rank), mesh, [Partial(), Partial()])
    summary = paramstats.summarize({"y": y})
    check_same_on_all_ranks(summary)
    assert (summary["y"].mean, summary["y"].count) == (10.0, 2)
    only_row = paramstats.summarize({"p": p}, group=mesh["tp"].get_group())
    assert only_row["p"].grad.mean == 3.0


@on_ranks(2)
def test_equal_meshes_with_different_groups():
    one, other = (init_device_mesh("cpu", (2,)) for _ in range(2))
    p = _replicated(3, one)
    p.grad = DTensor.from_local(torch.ones(3), other if dist.get_rank() else one, [Partial()])
    assert paramstats.summarize({"p": p})["p"].grad.mean == 2.0


LABEL = ("w", True)


def _spec(operator="sum", index=0, replica=(7,), numel=5, dtype=torch.float32) -> PartialSpec:
    return PartialSpec(Reduction(operator, 1, 2, replica), dtype, numel, index)


def _plan(*specs: PartialSpec | None):
    return make_plan([((LABEL, spec),) if spec is not None else () for spec in specs])


def test_plan_has_a_slot_for_one_replica_of_each_shard():
    plan = _plan(_spec(), _spec(), _spec(replica=(8,)), _spec(replica=(8,)))
    assert plan == (((LABEL, _spec(), 0, 0),), {("sum", torch.float32): 5})
    last = _spec(index=1, numel=4)
    plan = _plan(last, None, _spec(), last)
    assert plan.slots == ((LABEL, _spec(), 0, 1), (LABEL, last, 5, 0))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_spec(numel=6), r"'w \(gradient\)' to have values of one size on all ranks, got \[5, 6\]"),
        (_spec("max"), "one operator and dtype on all ranks, got max of torch.float32, sum of"),
        (_spec(dtype=torch.float64), "got sum of torch.float32, sum of torch.float64"),
    ],
)
def test_contradicting_specs_raise(other, message):
    with pytest.raises(ValueError, match=message):
        _plan(_spec(), None, other)
