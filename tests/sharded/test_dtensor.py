"""Models of DTensors: fully_shard, tensor parallel, both, and what is mixed with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import paramstats
from tests.sharded.models import Transformer, backward, check, statistics, tokens
from tests.sharded.together import together


def _sharded(model: Transformer, mesh, **kwargs) -> Transformer:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def _check_all_alike(summary: paramstats.Summary) -> None:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, statistics(summary))
    assert len(set(everyone)) == 1


# ---- fully_shard ----------------------------------------------------------------------------


def _fsdp2(policy: MixedPrecisionPolicy, tied: bool) -> None:
    model = Transformer(tied=tied)
    plain = copy.deepcopy(model)
    _sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        summary = paramstats.summarize(model)
        check(summary, dict(model.named_parameters()))
        _check_all_alike(summary)
        optimizer.step()
    backward(plain)
    aliases = paramstats.summarize(plain)["embedding.weight"].aliases
    assert summary["embedding.weight"].aliases == aliases == (("head.weight",) if tied else ())
    total = sum(p.numel() for p in plain.parameters())
    assert summary.total.count == summary.total.grad.count == total


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_fully_shard(processes, tied):
    together(processes, _fsdp2, MixedPrecisionPolicy(), tied)


def _by_torch_operators() -> None:
    paramstats._core.backend._active = paramstats._core.backend.choose("reference")
    _fsdp2(MixedPrecisionPolicy(), True)


def test_with_the_reference_engine():
    together(4, _by_torch_operators)


def test_fully_shard_in_bfloat16():
    together(2, _fsdp2, MixedPrecisionPolicy(torch.bfloat16, torch.float32), True)


def _between() -> None:
    """After a forward the root's parameters are gathered copies, in bfloat16."""
    model = Transformer()
    policy = MixedPrecisionPolicy(torch.bfloat16)
    _sharded(model, init_device_mesh("cpu", (2,)), mp_policy=policy, reshard_after_forward=False)
    names = list(dict(model.named_parameters()))
    before = paramstats.summarize(model)
    for mode in (model.train, model.eval):
        mode()
        loss = model(tokens()).float().sum()
        assert not all(isinstance(p, DTensor) for p in model.parameters())
        assert paramstats.summarize(model) == before
        if model.training:
            loss.backward()
            model.zero_grad()
    assert list(before) == names and before["norm.weight"].dtype == torch.float32
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    check(before, dict(model.named_parameters()))


def test_between_forward_and_backward():
    together(2, _between)


def _resharded_to_fewer() -> None:
    """After a forward, parameters that fully_shard keeps on a smaller mesh until backward."""
    model = Transformer()
    _sharded(model, init_device_mesh("cpu", (4,)), reshard_after_forward=2)
    before = paramstats.summarize(model)
    model(tokens())
    assert len({id(p.device_mesh) for p in model.parameters() if isinstance(p, DTensor)}) == 2
    assert paramstats.summarize(model) == before


def test_resharded_to_fewer_processes():
    together(4, _resharded_to_fewer)


def _hybrid() -> None:
    model = Transformer()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    _sharded(model, mesh)
    backward(model)
    summary = paramstats.summarize(model)
    check(summary, dict(model.named_parameters()))
    _check_all_alike(summary)


def test_hybrid_sharding():
    together(4, _hybrid)


def _ignored() -> None:
    """Parameters that fully_shard was told to leave alone are plain tensors among DTensors."""
    model = Transformer(tied=False)
    ignored = set(model.norm.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)
    backward(model)
    kinds = {isinstance(p, DTensor) for p in model.parameters()}
    assert kinds == {True, False}
    check(paramstats.summarize(model), dict(model.named_parameters()))


def test_ignored_parameters():
    together(2, _ignored)


# ---- tensor parallel ------------------------------------------------------------------------


def _tensor_parallel(model: Transformer, mesh) -> Transformer:
    for block in model.blocks:
        plan = {"norm": SequenceParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        plan["up"] = ColwiseParallel(input_layouts=Shard(1))
        plan["down"] = RowwiseParallel(output_layouts=Shard(1))
        parallelize_module(block, mesh, plan)
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


class _Scaleless(Transformer):
    """SequenceParallel takes no plain parameters beside DTensors."""

    def __init__(self) -> None:
        super().__init__(tied=False, words=14)
        for block in self.blocks:
            del block.scale
            block.scale = 1.0


def _tp() -> None:
    model = _tensor_parallel(_Scaleless(), init_device_mesh("cpu", (2,)))
    backward(model, tokens(14))
    placed = [p.grad.placements for p in model.parameters()]
    assert any(placement.is_partial() for placements in placed for placement in placements)
    summary = paramstats.summarize(model)
    check(summary, dict(model.named_parameters()))
    _check_all_alike(summary)


def test_tensor_parallel():
    together(2, _tp)


def _tp_and_fsdp2() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _sharded(_tensor_parallel(_Scaleless(), mesh["tp"]), mesh["dp"])
    kinds = {type(x).__name__ for p in model.parameters() for x in p.placements}
    assert "_StridedShard" in kinds
    backward(model, tokens(14))
    summary = paramstats.summarize(model)
    check(summary, dict(model.named_parameters()))
    _check_all_alike(summary)


def test_tensor_parallel_within_fully_shard():
    together(4, _tp_and_fsdp2)


def _partial_everywhere() -> None:
    """Addends of a sum, a mean and a maximum; the gradient of one process is None."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    named = {}
    for op, dtype in (("sum", torch.float32), ("avg", torch.float64), ("max", torch.bfloat16)):
        local = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank)).to(dtype)
        named[op] = DTensor.from_local(local, mesh, [Partial(op), Partial(op)])
    named["one"] = DTensor.from_local(torch.ones(4) * (rank // 2), mesh, [Partial(), Shard(0)])
    summary = paramstats.summarize(named)
    _check_all_alike(summary)
    assert summary["one"].mean == 1.0 and summary["one"].count == 8
    locals_ = [torch.randn(5, 3, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    expected = {
        "sum": sum(locals_),
        "avg": sum(x.double() for x in locals_) / 4,
        "max": torch.stack(locals_).to(torch.bfloat16).amax(0),
    }
    for op, x in expected.items():
        assert summary[op].norm == pytest.approx(x.double().norm().item(), rel=1e-6)
        assert summary[op].max == pytest.approx(x.max().item(), rel=1e-6)


def test_partial_tensors():
    together(4, _partial_everywhere)


def _partial_gradient_that_comes_and_goes() -> None:
    """What is added up is agreed on again when it changes, and None takes part with nothing."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Replicate()]))
    addends = DTensor.from_local(torch.full((6,), 1.0 + rank), mesh, [Partial()])
    whole = DTensor.from_local(torch.full((6,), 7.0), mesh, [Replicate()])

    def mean(on_rank_0, on_rank_1):
        p.grad = (on_rank_0, on_rank_1)[rank]
        summary = paramstats.summarize({"p": p})
        grad = summary["p"].grad
        return None if grad is None else (grad.mean, sorted(summary.diverged))

    assert mean(None, None) is None
    assert mean(addends, addends) == (3.0, [])
    assert mean(None, None) is None
    assert mean(addends, addends) == (3.0, [])
    assert mean(addends, None) == (1.0, ["p (gradient)"])
    assert mean(whole, whole) == (7.0, [])
    assert mean(addends, addends) == (3.0, [])


def test_partial_gradient_that_comes_and_goes():
    together(2, _partial_gradient_that_comes_and_goes)
