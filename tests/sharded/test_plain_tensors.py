"""Models of plain tensors: `LocalShard`, pipeline stages, DDP, groups of some ranks."""

from __future__ import annotations

import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import paramstats
from paramstats._sharded import groups
from tests import oracle
from tests.sharded.models import (
    Transformer,
    backward,
    check,
    check_same_on_all_ranks,
    collective_calls,
    sharded,
)
from tests.sharded.ranks import free_groups, on_ranks


@on_ranks(4)
def test_local_shards_with_replicas():
    """As in Megatron: columns on two ranks, and replicas of these on two others."""
    rank = dist.get_rank()
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    column = nn.Parameter(values.chunk(2, dim=1)[rank % 2])
    column.main_grad = torch.full_like(column, float(rank % 2))
    shard = paramstats.LocalShard(column, rank % 2, values.numel(), values.shape, column.main_grad)
    summary = paramstats.summarize({"w": shard, "norm": torch.ones(3)})
    oracle.check(summary["w"], values)
    assert summary["w"].shape == (6, 9) and summary["w"].requires_grad
    assert summary["w"].grad.mean == pytest.approx(24 / 54)
    assert summary["norm"].count == 3 and not summary.diverged
    local = paramstats.summarize({"w": shard}, local=True)
    assert local.is_local and local["w"].shape == column.shape and local["w"].requires_grad


def test_local_shard_without_process_group():
    entry = paramstats.summarize({"w": paramstats.LocalShard(torch.arange(4.0), 0, 4, (2, 2))})["w"]
    assert entry.mean == 1.5 and entry.shape == (2, 2)
    with pytest.raises(RuntimeError, match=r"the 5 elements of 'w', got 4"):
        paramstats.summarize({"w": paramstats.LocalShard(torch.arange(4.0), 0, 5)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0, 1), r"expected a torch.Tensor for tensor, got list"),
        ((torch.ones(3), -1, 3), "at least 0 for index, got -1"),
        ((torch.ones(3), 0, 2), "at least 3 for numel, got 2"),
        ((torch.ones(3), 0, 3.0), r"for numel, got 3\.0"),
        ((torch.ones(3), 2**70, 3), "for index, got 1180591620717411303424"),
        ((torch.ones(3), 0, 12, (3, 3)), r"a shape of 12 elements, got \(3, 3\)"),
    ],
)
def test_invalid_local_shard_raises(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        paramstats.LocalShard(*arguments)


@on_ranks(2)
def test_pipeline_stages_are_merged():
    rank = dist.get_rank()
    whole = Transformer()
    backward(whole)
    expected = paramstats.summarize(whole)
    stage = {name: p for i, (name, p) in enumerate(whole.named_parameters()) if i % 2 == rank}
    summary = paramstats.summarize(stage, group=dist.group.WORLD)
    assert set(summary) == set(expected)
    for name, entry in expected.items():
        got = summary[name]
        assert (got.norm, got.grad, got.shape) == (entry.norm, entry.grad, entry.shape)
    assert summary.total.norm == pytest.approx(expected.total.norm, rel=1e-12)
    check_same_on_all_ranks(summary)


@on_ranks(4)
def test_sharded_pipeline_stages_with_buffers_are_merged():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = dist.get_rank() // 2
    torch.manual_seed(stage)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    expected = paramstats.summarize(module)
    fully_shard(module, mesh=mesh["dp"])
    model = nn.ModuleDict({f"stage{stage}": module})
    summary = paramstats.summarize(model, buffers=True)
    assert list(summary)[:8] == [f"stage{s}.{n}" for s in (0, 1) for n in expected]
    assert len(summary) == 8 + 6  # parameters, buffers
    assert summary.total.count == 2 * expected.total.count
    for name, entry in expected.items():
        assert summary[f"stage{stage}.{name}"].norm == pytest.approx(entry.norm, rel=1e-6)
    own_stage = paramstats.summarize(model, group=mesh["dp"].get_group())
    assert list(own_stage) == [f"stage{stage}.{n}" for n in expected]


@on_ranks(2)
def test_groups_are_checked_and_freed():
    world = dist.group.WORLD
    only_0 = dist.new_group([0])
    source = {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="ProcessGroup for group, got str"):
        paramstats.summarize(source, group="world")
    if dist.get_rank() == 0:
        assert paramstats.summarize(source, group=only_0)["w"].count == 2
    else:
        with pytest.raises(ValueError, match="a group that this rank belongs to"):
            paramstats.summarize(source, group=only_0)
    x = sharded(torch.ones(4))
    paramstats.summarize({"x": x})
    paramstats.summarize({"x": x}, async_op=True).wait()
    kept = [weakref.ref(world), weakref.ref(groups.background_of(world))]
    dist.barrier()
    dist.destroy_process_group()
    del world, only_0, x
    free_groups()
    assert [group() for group in kept] == [None, None]
    assert paramstats.summarize({"w": paramstats.LocalShard(torch.ones(2), 0, 2)})["w"].count == 2


@on_ranks(2)
def test_diverged_and_is_local_are_exported():
    source = {"w": torch.full((3,), float(dist.get_rank()))}
    diverged = {"w": "rank 1 differs from rank 0"}
    summary = paramstats.summarize(source, group=dist.group.WORLD)
    assert summary.to_pandas().attrs == {"diverged": diverged}
    local = paramstats.summarize({"w": paramstats.LocalShard(source["w"], 0, 6)}, local=True)
    for exported, expected in ((summary, {"diverged": diverged}), (local, {"is_local": True})):
        copy = pickle.loads(pickle.dumps(exported))
        assert copy == exported and copy.diverged == expected.get("diverged", {})
        assert copy.is_local == exported.is_local == ("is_local" in expected)
        values = exported.to_dict()
        assert {key: values[key] for key in values if key not in ("params", "total")} == expected


@on_ranks(2)
def test_ddp_communicates_only_with_a_group():
    model = Transformer()
    wrapped = DistributedDataParallel(model)
    backward(wrapped)
    summaries = []
    assert collective_calls(lambda: summaries.append(paramstats.summarize(wrapped))) == 0
    (summary,) = summaries
    check(summary, dict(model.named_parameters()))
    paramstats.summarize(model, group=dist.group.WORLD)  # has no other names
    exchanged = paramstats.summarize(wrapped, group=dist.group.WORLD)
    assert not exchanged.diverged and exchanged == summary
    for both in (summary, exchanged):
        assert both["module.norm.weight"] == both["norm.weight"]
        assert both["module.head.weight"].aliases == ("head.weight",)
    if dist.get_rank() == 1:
        model.norm.weight.data[3] += 1e-6
    diverged = paramstats.summarize(wrapped, group=dist.group.WORLD).diverged
    assert list(diverged) == ["norm.weight"]
