"""What goes wrong on one process is known to all; what differs is named; nothing hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import paramstats
from paramstats._sharded import exchange
from tests import oracle
from tests.sharded.models import Transformer, backward, statistics
from tests.sharded.together import together


def messages_of(call) -> set[str]:
    """What `call` raises on each process."""
    try:
        call()
        message = "nothing"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, message)
    return set(everyone)


def _whole(values: torch.Tensor) -> DTensor:
    return distribute_tensor(values, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


# ---- values ---------------------------------------------------------------------------------


def _nan_on_one() -> None:
    x = _whole(torch.arange(10.0))
    if dist.get_rank() == 1:
        x.to_local()[0] = torch.nan
        x.to_local()[1] = -torch.inf
    stats = paramstats.summarize({"x": x})["x"]
    oracle.check(stats, x.full_tensor())
    assert (stats.nan_count, stats.neg_inf_count) == (1, 1)


def test_nan_on_one_process_is_seen_on_all():
    together(2, _nan_on_one)


def _exact() -> None:
    """Of float64, what exchanging and joining lose is in the last digits."""
    x = torch.randn(10_007, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for offset in (0.0, 1e6):
        values = x + offset
        got = paramstats.summarize({"x": _whole(values)})["x"]
        alone = paramstats.summarize({"x": values})["x"]
        for statistic in ("mean", "std", "norm"):
            a, b = getattr(got, statistic), getattr(alone, statistic)
            assert abs(a - b) <= 1e-12 * max(abs(b), alone.std), (offset, statistic)
        assert (got.min, got.max, got.count) == (alone.min, alone.max, alone.count)


def test_joining_loses_nothing():
    together(4, _exact)


def _padding() -> None:
    """fully_shard keeps more memory than there are elements; what lies there is nobody's."""
    layer = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (4,)))
    for p in layer.parameters():
        local = p.to_local()
        size = local.untyped_storage().nbytes() // 4
        memory = torch.empty(0).set_(local.untyped_storage(), 0, (size,))
        mine = torch.zeros(size, dtype=torch.bool)
        begin = local.storage_offset()
        mine[begin : begin + local.numel()] = True
        memory[~mine] = torch.nan
    summary = paramstats.summarize(layer)
    assert summary["weight"].count == 15 and summary.total.nan_count == 0


def test_padding_is_not_read():
    together(4, _padding)


def _untouched() -> None:
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (2,)))
    backward(model)
    before = [
        (p, p._version, p.grad, p.grad._version, p.to_local().clone()) for p in model.parameters()
    ]
    paramstats.summarize(model, grad_scale=8.0)
    for p, (same, version, grad, grad_version, values) in zip(
        model.parameters(), before, strict=True
    ):
        assert p is same and p.grad is grad
        assert (p._version, grad._version) == (version, grad_version)
        assert torch.equal(p.to_local(), values) and p.is_leaf and p.grad_fn is None
    scaled = paramstats.summarize(model, grad_scale=8.0)
    plain = paramstats.summarize(model)
    assert scaled.total.grad.norm == pytest.approx(plain.total.grad.norm / 8, rel=1e-12)


def test_models_are_left_as_they_were():
    together(2, _untouched)


# ---- what is missing ------------------------------------------------------------------------


def _gradient_none_on_one() -> None:
    x = nn.Parameter(_whole(torch.arange(10.0)))
    plain = nn.Parameter(torch.ones(3))
    x.grad = _whole(torch.ones(10))
    plain.grad = torch.ones(3)
    if dist.get_rank() == 1:
        x.grad = None
    messages = messages_of(lambda: paramstats.summarize({"x": x, "plain": plain}))
    assert len(messages) == 1
    assert "the 10 elements of 'x (gradient)', got 5" in messages.pop()
    assert paramstats.summarize({"x": x}, grads=False)["x"].count == 10
    local = paramstats.summarize({"x": x}, local=True)
    assert local["x"].count == 5 and local["x"].shape == (5,) and local.is_local
    assert "this process's part" in local.table() and "part" in repr(local)
    # Of a copy there is another: its statistics stand, and the difference is told.
    if dist.get_rank() == 1:
        plain.grad = None
    x.grad = None
    summary = paramstats.summarize({"x": x, "plain": plain})
    assert summary["x"].grad is None
    assert summary["plain"].grad.mean == 1.0
    assert list(summary.diverged) == ["plain (gradient)"]
    assert "rank 1" in summary.diverged["plain (gradient)"]


def test_gradient_that_is_none_on_one_process():
    together(2, _gradient_none_on_one)


def _missing_shard() -> None:
    rank = dist.get_rank()
    source = {"there": _whole(torch.ones(8)), "w": _whole(torch.arange(10.0))}
    if rank == 2:
        del source["w"]
    begin = time.monotonic()
    messages = messages_of(lambda: paramstats.summarize(source))
    assert time.monotonic() - begin < 10
    assert len(messages) == 1
    message = messages.pop()
    assert "RuntimeError" in message and "the 10 elements of 'w', got 8" in message
    assert paramstats.summarize(source, exclude="^w$")["there"].count == 8


def test_missing_shard():
    together(3, _missing_shard)


def _error_on_one() -> None:
    source = {"w": _whole(torch.ones(8))}
    real = paramstats._core.backend.active().read
    backend = paramstats._core.backend.active()
    if dist.get_rank() == 1:

        def fail(*args):
            raise MemoryError("no memory")

        object.__setattr__(backend, "read", fail)
    messages = messages_of(lambda: paramstats.summarize(source))
    assert {m.partition(":")[0] for m in messages} == {"MemoryError", "RuntimeError"}
    assert any("rank 1" in m for m in messages)
    object.__setattr__(backend, "read", real)
    assert paramstats.summarize(source)["w"].count == 8


def test_error_on_one_process_ends_the_call_on_all():
    together(3, _error_on_one)


def _different_shapes() -> None:
    rank = dist.get_rank()
    source = {"w": torch.ones(3 + rank)}
    for _ in range(2):
        messages = messages_of(lambda: paramstats.summarize(source, group=dist.group.WORLD))
        assert len(messages) == 1
        assert "expected one shape for 'w'" in messages.pop()
    same = {"w": torch.ones(3)}
    assert paramstats.summarize(same, group=dist.group.WORLD)["w"].count == 3


def test_one_name_for_different_tensors():
    together(2, _different_shapes)


def _nothing_here() -> None:
    rank = dist.get_rank()
    world = dist.group.WORLD
    stage = {"w": torch.ones(3)} if rank == 0 else {}
    summary = paramstats.summarize(stage, group=world)
    assert list(summary) == ["w"] and summary["w"].count == 3
    assert list(paramstats.summarize(nn.ReLU(), group=world)) == []
    layer = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (2,)))
    with pytest.warns(RuntimeWarning, match="no name passes"):
        assert list(paramstats.summarize(layer, include="nothing")) == []


def test_processes_without_tensors():
    together(2, _nothing_here)


def _held_by_none() -> None:
    """A mesh that no process of the group is part of; and one that only some are part of."""
    rank = dist.get_rank()
    mesh = DeviceMesh("cpu", [2, 3])
    local = torch.arange(4.0) + 4 * (rank - 2) if rank >= 2 else torch.empty(0)
    x = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(8,), stride=(1,))
    few = dist.new_group([0, 1])
    if rank < 2:
        with pytest.raises(RuntimeError, match="the 8 elements of 'x', got none"):
            paramstats.summarize({"x": x}, group=few)
    assert paramstats.summarize({"x": x})["x"].mean == 3.5


def test_mesh_of_other_processes():
    together(4, _held_by_none)


def _parameters_left_out() -> None:
    layer = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (2,)))
    layer(torch.ones(2, 3)).sum().backward()
    summary = paramstats.summarize(layer, params=False)
    weight = summary["weight"]
    assert weight.count == 15 and weight.mean != weight.mean and not summary.skipped
    assert weight.grad.mean == 2.0


def test_parameters_left_out():
    together(2, _parameters_left_out)


# ---- copies ---------------------------------------------------------------------------------


def _flipped_bit() -> None:
    rank = dist.get_rank()
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
        local = source[name].to_local() if name != "plain" else source[name]
        for bit in (12, 23, 31):
            if rank == 3:
                local.view(torch.int32)[5, 1] ^= (1 << bit) - (bit == 31) * (1 << 32)
            summary = paramstats.summarize(source)
            assert list(summary.diverged) == [name], (name, bit)
            assert f"copies differ: {name}: rank " in summary.table()
            assert f"copies differ: {name}" in summary._repr_html_()
            if rank == 3:
                local.view(torch.int32)[5, 1] ^= (1 << bit) - (bit == 31) * (1 << 32)
    assert not paramstats.summarize(source).diverged


def test_flipped_bit_is_named():
    together(4, _flipped_bit)


def _other_instructions() -> None:
    """What AVX2 adds up may end in another last digit than AVX-512's: no divergence."""
    native = paramstats._core.backend.active().native
    if native is not None and dist.get_rank() == 1:
        native.set_simd_level("plain")
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    source = {"copy": values, "sharded": _whole(values)}
    assert not paramstats.summarize(source).diverged


def test_other_instructions_are_no_divergence():
    together(2, _other_instructions)


# ---- collectives ----------------------------------------------------------------------------


def _counted() -> None:
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (2,)))
    backward(model)
    plain = Transformer()
    paramstats.summarize(model)
    for source, expected in ((model, 1), (plain, 0)):
        for _ in range(2):
            with CommDebugMode() as counted:
                paramstats.summarize(source)
            assert counted.get_total_counts() == expected
    with CommDebugMode() as counted:
        paramstats.summarize(model, local=True)
    assert counted.get_total_counts() == 0
    mesh = init_device_mesh("cpu", (2,))
    addends = [DTensor.from_local(torch.ones(n), mesh, [Partial()]) for n in (3, 4, 5)]
    partial = {str(i): x for i, x in enumerate(addends)}
    partial["narrow"] = DTensor.from_local(torch.ones(3).bfloat16(), mesh, [Partial()])
    partial["other"] = DTensor.from_local(torch.ones(3), mesh, [Partial("max")])
    paramstats.summarize(partial)
    with CommDebugMode() as counted:
        paramstats.summarize(partial)
    assert counted.get_total_counts() == 1 + 2  # of sums and of maxima
    exchange.ALL_TO_ALL_FROM = 2  # of more processes than are here
    with CommDebugMode() as counted:
        paramstats.summarize(model)
    assert counted.get_total_counts() == 2  # an all_to_all and an all_gather


def test_collectives_are_counted():
    together(2, _counted)


def _models_in_turn() -> None:
    """Of several models in one group each is agreed on once."""
    rank = dist.get_rank()
    models = [fully_shard(nn.Linear(n, 3), mesh=init_device_mesh("cpu", (2,))) for n in (2, 5, 3)]
    expected = [3 * n for n in (2, 5, 3)]
    for _ in range(3):
        assert [paramstats.summarize(m)["weight"].count for m in models] == expected
    with CommDebugMode() as counted:
        assert [paramstats.summarize(m)["weight"].count for m in models] == expected
    assert counted.get_total_counts() == 3
    # One process freezes a layer on its own: agreed on again, and again when it is undone.
    for frozen in (True, False):
        if rank == 1:
            models[1].bias.requires_grad_(not frozen)
        for m, n in zip(models, expected, strict=True):
            assert paramstats.summarize(m)["weight"].count == n


def test_models_in_turn():
    together(2, _models_in_turn)


# ---- beside the training --------------------------------------------------------------------


def _async() -> None:
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, later = [], []
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        expected.append(paramstats.summarize(model))
        later.append(paramstats.summarize(model, async_op=True))
        optimizer.step()
    assert all(isinstance(s, paramstats.Summary) for s in later)
    for got, now in zip(later, expected, strict=True):
        assert got.wait() is got and got.ready()
        assert statistics(got) == statistics(now) and got == now
        assert repr(got.scalars()) == repr(now.scalars())
    end = time.monotonic() + 10
    last = paramstats.summarize(model, async_op=True)
    while not last.ready():
        assert time.monotonic() < end
        time.sleep(0.001)
    # What is missing is told where the statistics are asked for.
    p = nn.Parameter(_whole(torch.ones(4)))
    grad = _whole(torch.ones(4))
    p.grad = grad if dist.get_rank() == 0 else None
    broken = paramstats.summarize({"p": p}, async_op=True)
    assert "got 2" in "".join(messages_of(broken.wait))
    # A call goes on from what the one before it has agreed on, without waiting for it.
    frozen = next(iter(model.parameters())).requires_grad_(False)
    several = [paramstats.summarize(model, async_op=True) for _ in range(3)]
    assert all(s["norm.weight"].count == 8 for s in several)
    assert not several[0][next(iter(several[0]))].requires_grad and frozen is not None
    dangling = paramstats.summarize(model, async_op=True)  # nobody ever looks at it
    del dangling


def test_exchange_beside_the_training():
    together(2, _async)


def _destroyed_before() -> None:
    source, world = {"w": torch.ones(3)}, dist.group.WORLD
    paramstats.summarize(source, group=world, async_op=True).wait()
    rank = dist.get_rank()
    if rank == 1:
        time.sleep(1)  # the other waits for this one
    pending = paramstats.summarize(source, group=world, async_op=True)
    dist.destroy_process_group()
    outcome = ""
    try:
        outcome = f"count {pending['w'].count}"
    except RuntimeError as error:
        outcome = str(error)
    told = ["count 3", "call wait() first"]  # it may have been in time
    if rank == 1:  # it may have met the other's closed end before its own group went
        told.append("expected every process of the group to make this call")
    assert any(words in outcome for words in told), outcome


def test_group_that_is_destroyed_before():
    together(2, _destroyed_before)
