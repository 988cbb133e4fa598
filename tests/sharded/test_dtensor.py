"""Models of DTensors: fully_shard, tensor parallelism, and both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import paramstats
from paramstats._core import backend as backends
from tests.sharded.models import Transformer, backward, check, tensor_parallel, tokens
from tests.sharded.ranks import on_ranks, run_on_ranks


def _fully_shard(model: Transformer, mesh, **kwargs) -> Transformer:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def _train(policy: MixedPrecisionPolicy, tied: bool, backend: str | None) -> None:
    before = backends.active()
    backends._active = backends.choose(backend) if backend else before
    try:
        model = Transformer(tied=tied)
        aliases = paramstats.summarize(model)["embedding.weight"].aliases
        total = sum(p.numel() for p in model.parameters())
        _fully_shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            summary = paramstats.summarize(model)
            check(summary, dict(model.named_parameters()))
            optimizer.step()
        assert summary["embedding.weight"].aliases == aliases == (("head.weight",) if tied else ())
        assert summary.total.count == summary.total.grad.count == total
    finally:
        backends._active = before


@pytest.mark.parametrize(
    ("ranks", "tied", "dtype", "backend"),
    [
        (2, True, None, None),
        (4, True, None, None),
        (4, False, None, None),
        (2, True, torch.bfloat16, None),
        (4, True, None, "reference"),
    ],
)
def test_fully_shard(ranks, tied, dtype, backend):
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None)
    run_on_ranks(ranks, _train, policy, tied, backend)


@on_ranks(2)
def test_sharded_parameters_are_read_while_gathered_ones_are_in_place():
    model = Transformer()
    policy = MixedPrecisionPolicy(torch.bfloat16)
    mesh = init_device_mesh("cpu", (2,))
    _fully_shard(model, mesh, mp_policy=policy, reshard_after_forward=False)
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


@on_ranks(4)
def test_parameters_resharded_to_a_smaller_mesh_after_forward():
    model = Transformer()
    _fully_shard(model, init_device_mesh("cpu", (4,)), reshard_after_forward=2)
    before = paramstats.summarize(model)
    model(tokens())
    assert len({id(p.device_mesh) for p in model.parameters() if isinstance(p, DTensor)}) == 2
    assert paramstats.summarize(model) == before


@on_ranks(4)
def test_hybrid_sharding():
    model = Transformer()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    _fully_shard(model, mesh)
    backward(model)
    check(paramstats.summarize(model), dict(model.named_parameters()))


@on_ranks(2)
def test_plain_parameters_among_dtensors():
    model = Transformer(tied=False)
    ignored = set(model.norm.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)
    backward(model)
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    check(paramstats.summarize(model), dict(model.named_parameters()))


@on_ranks(2)
def test_tensor_parallelism_with_partial_gradients():
    model = tensor_parallel(init_device_mesh("cpu", (2,)))
    backward(model, tokens(14))
    assert any(x.is_partial() for p in model.parameters() for x in p.grad.placements)
    check(paramstats.summarize(model), dict(model.named_parameters()))


@on_ranks(4)
def test_tensor_parallelism_within_fully_shard():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _fully_shard(tensor_parallel(mesh["tp"]), mesh["dp"])
    assert "_StridedShard" in {type(x).__name__ for p in model.parameters() for x in p.placements}
    backward(model, tokens(14))
    check(paramstats.summarize(model), dict(model.named_parameters()))
