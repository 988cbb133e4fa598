"""Errors reach all ranks, differences are named, and collective calls are few."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import paramstats
from paramstats._core.backend import active
from paramstats._core.moments import ROW, unread
from paramstats._sharded import exchange, local_rows, local_shards
from tests import oracle
from tests.sharded.models import Transformer, backward, collective_calls, messages_of, sharded
from tests.sharded.ranks import on_ranks


def _collective_calls(source, **options) -> int:
    return collective_calls(lambda: paramstats.summarize(source, **options))


@on_ranks(2)
def test_nan_on_one_rank_is_seen_on_all():
    x = sharded(torch.arange(10.0))
    if dist.get_rank() == 1:
        x.to_local()[:2] = torch.tensor([torch.nan, -torch.inf])
    oracle.check(paramstats.summarize({"x": x})["x"], x.full_tensor())


@on_ranks(4)
def test_merged_float64_statistics_are_as_exact_as_local_ones():
    x = torch.randn(10_007, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for values in (x, x + 1e6):
        merged = paramstats.summarize({"x": sharded(values)})["x"]
        local = paramstats.summarize({"x": values})["x"]
        for statistic in ("mean", "std", "norm"):
            a, b = getattr(merged, statistic), getattr(local, statistic)
            assert abs(a - b) <= 1e-12 * max(abs(b), local.std), statistic
        assert (merged.min, merged.max, merged.count) == (local.min, local.max, local.count)


@on_ranks(4)
def test_padding_of_fully_shard_is_not_read():
    layer = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (4,)))
    for local in [p.to_local().detach() for p in layer.parameters()]:
        values = local.clone()
        size = local.untyped_storage().nbytes() // 4
        torch.empty(0).set_(local.untyped_storage(), 0, (size,)).fill_(torch.nan)
        local.copy_(values)
    summary = paramstats.summarize(layer)
    assert summary["weight"].count == 15 and summary.total.nan_count == 0


@on_ranks(2)
def test_model_is_not_changed_and_gradients_are_unscaled():
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (2,)))
    backward(model)

    def state():
        return [
            (id(p), p._version, id(p.grad), p.grad._version, p.to_local().tolist(), p.grad_fn)
            for p in model.parameters()
        ]

    before = state()
    scaled = paramstats.summarize(model, grad_scale=8.0)
    assert state() == before
    only_grads = paramstats.summarize(model, params=False)
    assert only_grads["norm.weight"].count == 8 and not only_grads["norm.weight"].is_read()
    assert only_grads["norm.weight"].grad.is_read() and not only_grads.skipped
    plain = paramstats.summarize(model)
    assert scaled.total.grad.norm == pytest.approx(plain.total.grad.norm / 8, rel=1e-12)


@on_ranks(2)
def test_gradient_that_is_none_on_one_rank():
    x = nn.Parameter(sharded(torch.arange(10.0)))
    plain = nn.Parameter(torch.ones(3))
    x.grad = sharded(torch.ones(10))
    plain.grad = torch.ones(3)
    if dist.get_rank() == 1:
        x.grad = None
    (message,) = messages_of(lambda: paramstats.summarize({"x": x, "plain": plain}))
    assert "the 10 elements of 'x (gradient)', got 5" in message
    assert paramstats.summarize({"x": x}, grads=False)["x"].count == 10
    local = paramstats.summarize({"x": x}, local=True)
    assert local["x"].count == 5 and local["x"].shape == (5,) and local.is_local
    assert "part" in local.table() and "part" in repr(local)
    # A plain tensor has a replica on the other rank, whose statistics are used.
    if dist.get_rank() == 1:
        plain.grad = None
    x.grad = None
    summary = paramstats.summarize({"x": x, "plain": plain})
    assert summary["x"].grad is None and summary["plain"].grad.mean == 1.0
    assert summary.diverged == {"plain (gradient)": "rank 1 differs from rank 0"}


@on_ranks(3)
def test_missing_shard_raises_on_all_ranks():
    source = {"other": sharded(torch.ones(8)), "w": sharded(torch.arange(10.0))}
    if dist.get_rank() == 2:
        del source["w"]
    (message,) = messages_of(lambda: paramstats.summarize(source))
    assert "RuntimeError" in message and "the 10 elements of 'w', got 8" in message
    assert paramstats.summarize(source, exclude="^w$")["other"].count == 8


@on_ranks(3)
def test_error_on_one_rank_raises_on_all():
    source = {"w": sharded(torch.ones(8))}

    def fail(*_):
        raise MemoryError("no memory")

    for module, function in ((local_rows, "read_rows"), (local_shards, "gradient")):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(module, function, fail)
            messages = messages_of(lambda: paramstats.summarize(source))
        assert {m.partition(":")[0] for m in messages} == {"MemoryError", "RuntimeError"}
        assert any("rank 1" in m for m in messages)
    assert paramstats.summarize(source)["w"].count == 8


def test_reason_of_an_unreadable_tensor_outlasts_transfers(monkeypatch):
    class Transfer:
        def details(self):
            return {}

        def write(self, table):
            ROW.pack_into(table, 0, *unread(4))

    table = ROW.pack(*unread(4)) * 2
    read = (table, [Transfer()], {0: "on purpose"}, {})
    monkeypatch.setattr(local_rows, "read_rows", lambda *_: read)
    with pytest.warns(RuntimeWarning, match="on purpose"):
        summary = paramstats.summarize({"w": paramstats.LocalShard(torch.ones(4), 0, 4)})
    assert summary.skipped == {"w": "on purpose"} and summary["w"].count == 4


@on_ranks(2)
def test_ranks_without_tensors():
    world = dist.group.WORLD
    stage = {"w": torch.ones(3)} if dist.get_rank() == 0 else {}
    assert paramstats.summarize(stage, group=world)["w"].count == 3
    assert list(paramstats.summarize(nn.ReLU(), group=world)) == []
    layer = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (2,)))
    with pytest.warns(RuntimeWarning, match="no name matches"):
        assert list(paramstats.summarize(layer, include="nothing")) == []


@on_ranks(4)
def test_mesh_of_some_ranks():
    rank = dist.get_rank()
    mesh = DeviceMesh("cpu", [2, 3])
    local = torch.arange(4.0) + 4 * (rank - 2) if rank >= 2 else torch.empty(0)
    x = DTensor.from_local(local, mesh, [Shard(0)], shape=(8,), stride=(1,))
    outside_mesh = dist.new_group([0, 1])
    if rank < 2:
        with pytest.raises(RuntimeError, match="the 8 elements of 'x', got none"):
            paramstats.summarize({"x": x}, group=outside_mesh)
    assert paramstats.summarize({"x": x})["x"].mean == 3.5


@on_ranks(4)
def test_flipped_bit_in_a_replica_is_named():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    values = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    source = {
        "hybrid": distribute_tensor(values, mesh, [Replicate(), Shard(0)]),
        "replicated": distribute_tensor(values, mesh, [Replicate(), Replicate()]),
        "sharded": distribute_tensor(values, mesh, [Shard(0), Shard(1)]),
        "plain": values.clone(),
    }
    assert not paramstats.summarize(source).diverged
    for name in ("hybrid", "replicated", "plain"):
        local = source[name] if name == "plain" else source[name].to_local()
        for flip in (1 << 12, 1 << 23, -1 << 31):
            flip *= dist.get_rank() == 3
            local.view(torch.int32)[5, 1] ^= flip
            summary = paramstats.summarize(source)
            assert list(summary.diverged) == [name], name
            assert f"differ: {name}: rank " in summary.table()
            assert f"differ: {name}" in summary._repr_html_()
            local.view(torch.int32)[5, 1] ^= flip
    assert not paramstats.summarize(source).diverged


@on_ranks(2, own_processes=True)
def test_replicas_read_by_other_simd_instructions_are_not_compared():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    native = active().native
    if native and dist.get_rank() == 1:
        native.set_simd_level("plain")
    assert not paramstats.summarize({"replica": values, "sharded": sharded(values)}).diverged


@on_ranks(2)
def test_number_of_collective_calls():
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(Transformer(), mesh=mesh)
    backward(model)
    for _ in range(2):  # the first call agrees on the tensors and makes room for zero rows
        paramstats.summarize(model)
    for source, expected in ((model, 1), (Transformer(), 0)):
        assert [_collective_calls(source) for _ in range(2)] == [expected] * 2
    assert _collective_calls(model, local=True) == 0
    partial = {str(n): DTensor.from_local(torch.ones(n), mesh, [Partial()]) for n in (3, 4, 5)}
    partial["narrow"] = DTensor.from_local(torch.ones(3).bfloat16(), mesh, [Partial()])
    partial["other"] = DTensor.from_local(torch.ones(3), mesh, [Partial("max")])
    paramstats.summarize(partial)
    assert _collective_calls(partial) == 1 + 2  # one for sums and one for maxima
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "ALL_TO_ALL_FROM", 2)  # as with many ranks
        # An all_to_all, an all_gather, and another one for zero rows.
        assert _collective_calls(model) == 3


@on_ranks(2)
def test_several_models_in_one_group():
    models = [fully_shard(nn.Linear(n, 3), mesh=init_device_mesh("cpu", (2,))) for n in (2, 5, 3)]

    def counts():
        return [paramstats.summarize(model)["weight"].count for model in models]

    for _ in range(3):
        assert counts() == [6, 15, 9]
    assert sum(map(_collective_calls, models)) == 3
    # One rank freezes a layer: the ranks agree again, and once more when it is unfrozen.
    for frozen in (True, False):
        if dist.get_rank() == 1:
            models[1].bias.requires_grad_(not frozen)
        assert counts() == [6, 15, 9]


@pytest.mark.parametrize("options", [{"async_op": True}, {"group": "any"}])
def test_local_does_not_go_with_communication(options):
    with pytest.raises(ValueError, match=f"expected local=True without {next(iter(options))}="):
        paramstats.summarize({"x": torch.ones(4)}, local=True, **options)
