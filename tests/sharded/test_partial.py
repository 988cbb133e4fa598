"""Partial tensors: who adds up what follows from what all have told, whatever one has met."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import paramstats
from paramstats.sharded.partial import Partials, plan
from paramstats.sharded.pieces import Mesh, Reduction
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
    assert "complex64" in summary.skipped["complex"] and "avg" in summary.skipped["counts"]
    assert summary["fine"].mean == 2.0
    beside = paramstats.summarize({"fine": source["fine"]}, async_op=True)
    assert "async_op" in beside.skipped["fine"]


def test_what_is_not_added_up_is_named():
    together(2, _not_added_up)


# ---- the plan, without processes ------------------------------------------------------------

MESH = Mesh((2, 2), (0, 1, 2, 3))
LABEL = ("w", True)


def told(*has: bool, dims=((1, "sum"),), numel: int = 5) -> list[Partials]:
    reduction = Reduction(dims, torch.float32, numel, MESH.number)
    return [Partials(((LABEL, reduction),), (MESH,)) if h else Partials() for h in has]


def on_mesh(place: int, label: tuple[str, bool]) -> int | None:
    return MESH.number


@pytest.mark.parametrize(
    ("dims", "taking_part"),
    [(((1, "sum"),), [0, 1]), (((0, "sum"),), [0, 2]), (((0, "sum"), (1, "max")), [0, 1, 2, 3])],
)
def test_who_takes_part(dims, taking_part):
    everyone = told(True, False, False, False, dims=dims)
    parts = [plan(everyone, on_mesh, place, range(4))[1] for place in range(4)]
    assert [place for place, own in enumerate(parts) if own] == taking_part
    assert all(plan(everyone, on_mesh, p, range(4))[0] == [LABEL] for p in range(4))


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"'w \(gradient\)' to be of one size"):
        plan([*told(True), *told(True, numel=6), *told(False, False)], on_mesh, 0, range(4))
    with pytest.raises(ValueError, match="on one mesh on all processes"):
        plan(told(True, False, True, True), lambda place, label: None, 0, range(4))
    with pytest.raises(ValueError, match="on a mesh within the group"):
        plan(told(True, True), on_mesh, 0, [0, 1])
