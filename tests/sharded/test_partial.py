"""Partial tensors: who adds up what follows from what all have told, whatever one has met."""

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
from paramstats._sharded.partial import Addend, Addends, plan
from tests.sharded.test_safety import messages_of
from tests.sharded.together import together


def _replicated(n: int, mesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.zeros(n), mesh, [Replicate()]))


def _after_other_models() -> None:
    """What was added up for one model, or before a layer was frozen somewhere, binds nobody."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    p, q, other = (_replicated(n, mesh) for n in (6, 2, 3))
    addends = DTensor.from_local(torch.ones(6), mesh, [Partial()])

    def mean():
        grad = paramstats.summarize({"p": p, "q": q})["p"].grad
        return None if grad is None else grad.mean

    p.grad = addends
    assert mean() == 2.0
    assert paramstats.summarize({"other": other})["other"].count == 3
    if rank == 1:
        q.requires_grad_(False)
    assert mean() == 2.0
    p.grad = None
    assert mean() is None
    q.requires_grad_(True)
    assert mean() is None
    p.grad = addends
    assert mean() == 2.0


def test_after_other_models():
    together(2, _after_other_models)


def _another_mesh() -> None:
    rank = dist.get_rank()
    for ranks in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]) * 2:
        mesh = DeviceMesh("cpu", ranks)
        addends = DTensor.from_local(torch.full((4,), float(rank)), mesh, [Shard(0), Partial()])
        summary = paramstats.summarize({"x": addends})
        assert summary["x"].mean == addends.full_tensor().mean() and not summary.diverged


def test_the_same_names_on_another_mesh():
    together(4, _another_mesh)


def _none_changes_nothing() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for op, expected in (("max", -1.0), ("min", 4.0), ("product", 3.0), ("sum", 5.0)):
        p = _replicated(3, mesh)
        if rank == 0:
            p.grad = DTensor.from_local(torch.full((3,), expected), mesh, [Partial(op)])
        summary = paramstats.summarize({"p": p})
        assert summary["p"].grad.mean == expected
        assert list(summary.diverged) == ["p (gradient)"]


def test_none_changes_nothing():
    together(2, _none_changes_nothing)


def _bad_addends() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    sparse, meta = torch.eye(3).to_sparse(), torch.ones(3, 3, device="meta")
    for bad in (sparse, meta):
        x = DTensor.from_local(torch.eye(3), mesh, [Partial()])
        if rank == 1:
            x._local_tensor = bad
        messages = messages_of(lambda x=x: paramstats.summarize({"x": x}))
        assert len(messages) == 2 and any("an error on rank 1" in m for m in messages)
    wide = torch.float64 if rank else torch.float32
    x = DTensor.from_local(torch.ones(3, dtype=wide), mesh, [Partial()])
    messages = messages_of(lambda: paramstats.summarize({"x": x}))
    assert len(messages) == 1 and "'x' to be partial in one way" in messages.pop()
    assert paramstats.summarize({"x": torch.ones(3)}, group=dist.group.WORLD)["x"].mean == 1


def test_addends_that_one_process_cannot_have():
    together(2, _bad_addends)


def _not_added_up() -> None:
    mesh = init_device_mesh("cpu", (2,))
    source = {
        "complex": DTensor.from_local(torch.ones(3, dtype=torch.complex64), mesh, [Partial()]),
        "counts": DTensor.from_local(torch.ones(3, dtype=torch.int32), mesh, [Partial("avg")]),
        "cut": distribute_tensor(torch.ones(4, dtype=torch.complex64), mesh, [Shard(0)]),
        "fine": DTensor.from_local(torch.ones(3), mesh, [Partial()]),
    }
    summary = paramstats.summarize(source)
    assert list(summary.skipped) == ["complex", "counts", "cut"]
    assert "complex64" in summary.skipped["complex"] and "int32" in summary.skipped["counts"]
    assert summary["fine"].mean == 2.0
    for odd in (_NormPartial(2.0), _MaskPartial(offset_shape=torch.Size([3]), offset_dim=0)):
        x = DTensor.from_local(torch.ones(3), mesh, [odd])
        assert type(odd).__name__ in paramstats.summarize({"x": x}).skipped["x"]


def test_what_is_not_added_up_is_named():
    together(2, _not_added_up)


def _mesh_of_each_row() -> None:
    """Tensor parallelism alone on the rows of a mesh: every row has a submesh of its own."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    p = _replicated(5, mesh["tp"])
    p.grad = DTensor.from_local(torch.full((5,), 1.0 + rank % 2), mesh["tp"], [Partial()])
    summary = paramstats.summarize({"p": p})
    assert summary["p"].grad.mean == 3.0 and not summary.diverged
    cut = DTensor.from_local(torch.full((2,), 1.0 + rank), mesh, [Shard(0), Partial("avg")])
    summary = paramstats.summarize({"cut": cut, "p": p}, group=dist.group.WORLD)
    assert (summary["cut"].min, summary["cut"].max, summary["cut"].count) == (1.5, 3.5, 4)
    only = paramstats.summarize({"p": p}, group=mesh["tp"].get_group())
    assert only["p"].grad.mean == 3.0


def test_a_mesh_for_each_row_of_processes():
    together(4, _mesh_of_each_row)


def _equal_meshes() -> None:
    """Meshes that are equal have process groups of their own; none of these is used."""
    rank = dist.get_rank()
    one, other = (init_device_mesh("cpu", (2,)) for _ in range(2))
    p = _replicated(3, one)
    p.grad = DTensor.from_local(torch.ones(3), other if rank else one, [Partial()])
    assert paramstats.summarize({"p": p})["p"].grad.mean == 2.0


def test_equal_meshes():
    together(2, _equal_meshes)


def _types() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int16, torch.uint8):
        x = DTensor.from_local(torch.full((3,), 1 + rank).to(dtype), mesh, [Partial()])
        for async_op in (False, True):
            assert paramstats.summarize({"x": x}, async_op=async_op)["x"].mean == 3
    flags = DTensor.from_local(torch.tensor([True, rank > 0]), mesh, [Partial("max")])
    assert paramstats.summarize({"x": flags})["x"].mean == 1


def test_types_of_addends():
    together(2, _types)


# ---- the plan, without processes ------------------------------------------------------------

LABEL = ("w", True)


def addend(operator="sum", key=0, replica=(7,), numel=5, dtype=torch.float32) -> Addend:
    return Addend(Addends(operator, 1, 2, replica), dtype, numel, key)


def told(*addends: Addend | None):
    return [((LABEL, a),) if a is not None else () for a in addends]


def test_copies_are_added_up_once():
    made = plan(told(addend(), addend(), addend(replica=(8,)), addend(replica=(8,))))
    (slot,) = made.slots
    assert (slot.replica, slot.numel, slot.missing) == ((7,), 5, 0)
    assert made.sizes == {("sum", torch.float32): 5}


def test_parts_stand_side_by_side():
    made = plan(told(addend(key=1, numel=4), None, addend(), addend(key=1, numel=4)))
    found = [(slot.key, slot.begin, slot.numel, slot.missing) for slot in made.slots]
    assert found == [(0, 0, 5, 1), (1, 5, 4, 0)]


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"'w \(gradient\)' to be of one size"):
        plan(told(addend(), addend(numel=6)))
    for other in (addend("max"), addend(dtype=torch.float64)):
        with pytest.raises(ValueError, match="to be partial in one way"):
            plan(told(addend(), None, other))
