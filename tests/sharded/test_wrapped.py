"""FullyShardedDataParallel and DeepSpeed, whose parameters are no DTensors."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import paramstats
from tests import oracle
from tests.sharded.models import Block, Transformer, backward, statistics, tokens
from tests.sharded.together import together


def _expected(plain: torch.nn.Module) -> dict[str, torch.Tensor]:
    backward(plain)
    return dict(plain.named_parameters())


def _check(summary: paramstats.Summary, named: dict[str, torch.Tensor], rtol: float) -> None:
    """Gradients were averaged over processes: their last digits are others."""
    assert set(summary) == set(named)
    assert not summary.diverged and not summary.skipped
    for name, p in named.items():
        entry = summary[name]
        assert entry.shape == tuple(p.shape), name
        oracle.check(entry, p)
        assert entry.grad is not None, name
        assert entry.grad.count == p.numel()
        assert entry.grad.norm == pytest.approx(p.grad.norm().item(), rel=rtol), name
        assert entry.grad.max == pytest.approx(p.grad.max().item(), rel=rtol, abs=1e-7), name
    alike = [b""] * dist.get_world_size()
    dist.all_gather_object(alike, statistics(summary))
    assert len(set(alike)) == 1


def _fsdp1(use_orig_params: bool, strategy: ShardingStrategy, nested: bool) -> None:
    warnings.simplefilter("ignore")  # torch's, about what is to replace it
    plain = Transformer()
    model = FullyShardedDataParallel(
        copy.deepcopy(plain),
        use_orig_params=use_orig_params,
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Block}) if nested else None,
        device_id="cpu",
    )
    for _ in range(2):
        model.zero_grad()
        plain.zero_grad()
        backward(model)
        _check(paramstats.summarize(model), _expected(plain), 1e-5)
    model.eval()
    with torch.no_grad():
        model(tokens())
    summary = paramstats.summarize(model)
    assert summary["embedding.weight"].count == 13 * 8
    assert summary["embedding.weight"].aliases == ("head.weight",)
    if use_orig_params:
        model.zero_grad()
        assert paramstats.summarize(model)["norm.weight"].grad is None


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_fsdp1(use_orig_params, nested):
    together(2, _fsdp1, use_orig_params, ShardingStrategy.FULL_SHARD, nested)


def test_fsdp1_of_four():
    together(4, _fsdp1, True, ShardingStrategy.SHARD_GRAD_OP, True)


def test_fsdp1_without_sharding():
    together(2, _fsdp1, True, ShardingStrategy.NO_SHARD, True)


def _fsdp1_states(use_orig_params: bool) -> None:
    """Before the first forward; after a backward without averaged gradients; in part frozen."""
    warnings.simplefilter("ignore")
    plain = Transformer()
    model = FullyShardedDataParallel(
        copy.deepcopy(plain), use_orig_params=use_orig_params, device_id="cpu"
    )
    summary = paramstats.summarize(model)
    for name, p in plain.named_parameters():
        oracle.check(summary[name], p)
    with model.no_sync():
        backward(model)
    assert all(entry.grad is None for entry in paramstats.summarize(model).values())
    if not use_orig_params:
        return
    for source in (model.named_parameters(), model.module):
        with pytest.raises(NotImplementedError, match="pass the wrapped model"):
            paramstats.summarize(source)
    plain.blocks.requires_grad_(False)
    frozen = FullyShardedDataParallel(plain, use_orig_params=True, device_id="cpu")
    backward(frozen)
    for name, entry in paramstats.summarize(frozen).items():
        assert entry.requires_grad == (entry.grad is not None) == ("blocks" not in name)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_states(use_orig_params):
    together(2, _fsdp1_states, use_orig_params)


def _fsdp1_flat_and_whole() -> None:
    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(
        Transformer(), sharding_strategy=ShardingStrategy.NO_SHARD, device_id="cpu"
    )
    with pytest.raises(NotImplementedError, match="pass use_orig_params=True"):
        paramstats.summarize(model)


def test_fsdp1_flat_and_whole_is_refused():
    together(2, _fsdp1_flat_and_whole)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def _zero(stage: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Or it tries compilers for all its operators, and compiles collectives in shared memory into
    # a folder of the user's, where it waits without end for a process that was killed meanwhile.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    plain = Transformer(tied=False)
    backend, *_ = deepspeed.initialize(
        model=copy.deepcopy(plain),
        model_parameters=None,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )
    batch = tokens()
    logits = backend(batch)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())
    backend.backward(loss)
    summary = paramstats.summarize(backend.module)
    if stage == 3:
        _check(summary, _expected(plain), 1e-5)
    else:
        for name, p in plain.named_parameters():
            oracle.check(summary[name], p)
            assert summary[name].grad is None or summary[name].grad.count == p.numel()
    backend.step()


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage):
    together(2, _zero, stage)
