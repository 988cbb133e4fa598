"""Shards that somebody cut by hand, pipeline stages, DDP, groups of some processes."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import paramstats
from paramstats._sharded.collectives import DESTROYED, Processes
from paramstats._sharded.merging import WORDS
from tests import oracle
from tests.sharded.models import Transformer, backward, check, statistics
from tests.sharded.together import together


def _by_hand() -> None:
    """Megatron's way: columns on two processes, copies of these on two others."""
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
    assert paramstats.summarize({"w": shard}, local=True).is_local


def test_shards_by_hand():
    together(4, _by_hand)


def test_a_shard_of_one_process():
    whole = paramstats.LocalShard(torch.arange(4.0), 0, 4, (2, 2))
    summary = paramstats.summarize({"w": whole})
    assert summary["w"].mean == 1.5 and summary["w"].shape == (2, 2)
    with pytest.raises(RuntimeError, match=r"the 5 elements of 'w', got 4"):
        paramstats.summarize({"w": paramstats.LocalShard(torch.arange(4.0), 0, 5)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0, 1), r"expected a torch.Tensor, got list"),
        ((torch.ones(3), -1, 3), "at least 0 for key, got -1"),
        ((torch.ones(3), 0, 2), "at least 3 for numel, got 2"),
        ((torch.ones(3), 0, 3.0), r"for numel, got 3\.0"),
        ((torch.ones(3), 2**70, 3), "for key, got 1180591620717411303424"),
        ((torch.ones(3), 0, 12, (3, 3)), r"a shape of 12 elements, got \(3, 3\)"),
    ],
)
def test_shards_that_cannot_be(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        paramstats.LocalShard(*arguments)


def _stages() -> None:
    """A plain model cut into stages: every process lists what all have."""
    rank = dist.get_rank()
    whole = Transformer()
    backward(whole)
    expected = paramstats.summarize(whole)
    stage = {name: p for i, (name, p) in enumerate(whole.named_parameters()) if i % 2 == rank}
    summary = paramstats.summarize(stage, group=dist.group.WORLD)
    assert set(summary) == set(expected)
    for name, entry in expected.items():
        assert (summary[name].norm, summary[name].grad) == (entry.norm, entry.grad)
        assert summary[name].shape == entry.shape
    assert summary.total.norm == pytest.approx(expected.total.norm, rel=1e-12)
    alike = [b""] * 2
    dist.all_gather_object(alike, statistics(summary))
    assert len(set(alike)) == 1


def test_pipeline_stages():
    together(2, _stages)


def _sharded_stages() -> None:
    """Two stages of two processes each, fully_shard within; buffers, too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = dist.get_rank() // 2
    torch.manual_seed(stage)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    expected = paramstats.summarize(module)
    fully_shard(module, mesh=mesh["dp"])
    model = nn.ModuleDict({f"stage{stage}": module})
    summary = paramstats.summarize(model, buffers=True)
    parameters = [f"stage{s}.{n}" for s in (0, 1) for n in expected]
    assert list(summary)[: len(parameters)] == parameters
    assert len(summary) == len(parameters) + 6
    assert summary.total.count == 2 * expected.total.count
    for name, entry in expected.items():
        assert summary[f"stage{stage}.{name}"].norm == pytest.approx(entry.norm, rel=1e-6)
    mine = paramstats.summarize(model, group=mesh["dp"].get_group())
    assert list(mine) == [f"stage{stage}.{n}" for n in expected]


def test_sharded_pipeline_stages():
    together(4, _sharded_stages)


def _groups() -> None:
    world = dist.group.WORLD
    only_0 = dist.new_group([0])
    source = {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="ProcessGroup for group, got str"):
        paramstats.summarize(source, group="world")
    if dist.get_rank() == 0:
        assert paramstats.summarize(source, group=only_0)["w"].count == 2
    else:
        with pytest.raises(ValueError, match="a group that this process belongs to"):
            paramstats.summarize(source, group=only_0)
    # What was agreed in a group goes with it.
    from paramstats._sharded import groups

    paramstats.summarize(source, group=world)
    paramstats.summarize(source, group=world, async_op=True).wait()
    assert world in groups._groups and len(groups._aside) == 1
    del world
    dist.barrier()
    dist.destroy_process_group()
    del only_0
    gc.collect()
    assert not len(groups._groups) and not len(groups._aside)
    assert paramstats.summarize({"w": paramstats.LocalShard(torch.ones(2), 0, 2)})["w"].count == 2


def test_groups():
    together(2, _groups)


def _saved() -> None:
    rank = dist.get_rank()
    source = {"w": torch.full((3,), float(rank))}
    summary = paramstats.summarize(source, group=dist.group.WORLD)
    told = {"w": "rank 1 differs from rank 0"}
    assert dict(summary.diverged) == told
    assert summary.to_dict()["diverged"] == told and "is_local" not in summary.to_dict()
    assert summary.to_pandas().attrs == {"diverged": told}
    again = pickle.loads(pickle.dumps(summary))
    assert again == summary and again.diverged == summary.diverged
    local = paramstats.summarize({"w": paramstats.LocalShard(source["w"], rank, 6)}, local=True)
    assert local.to_dict()["is_local"] is True
    assert pickle.loads(pickle.dumps(local)).is_local


def test_what_is_saved():
    together(2, _saved)


def _ddp() -> None:
    model = Transformer()
    wrapped = DistributedDataParallel(model)
    backward(wrapped)
    with CommDebugMode() as counted:
        summary = paramstats.summarize(wrapped)
    assert counted.get_total_counts() == 0
    check(summary, dict(wrapped.named_parameters()))
    same = paramstats.summarize(wrapped, group=dist.group.WORLD)
    assert not same.diverged and same == summary
    if dist.get_rank() == 1:
        model.norm.weight.data[3] += 1e-6
    assert list(paramstats.summarize(wrapped, group=dist.group.WORLD).diverged) == [
        "module.norm.weight"
    ]


def test_ddp_needs_nothing():
    together(2, _ddp)


@pytest.mark.parametrize(
    "call",
    [
        lambda processes: processes.all_gather(torch.ones(1, WORDS)),
        lambda processes: processes.all_to_all(torch.ones(1, 1, WORDS)),
        lambda processes: processes.gather_objects("mine"),
        lambda processes: processes.broadcast("mine", 0),
    ],
    ids=["all_gather", "all_to_all", "gather_objects", "broadcast"],
)
def test_a_group_that_is_gone_is_not_taken_for_a_failed_call(call):
    processes = Processes(None)
    processes._reference = lambda: None
    with pytest.raises(RuntimeError) as caught:
        call(processes)
    assert str(caught.value) == DESTROYED
