"""FullyShardedDataParallel, DeepSpeed, and names under wrappers."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import paramstats
from tests import oracle
from tests.sharded.models import Block, Transformer, backward, check, tokens
from tests.sharded.ranks import on_ranks, run_on_ranks


def _fsdp1(model: nn.Module, **options) -> FullyShardedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this wrapper
        return FullyShardedDataParallel(model, device_id="cpu", **options)


def _train_fsdp1(use_orig_params: bool, strategy: ShardingStrategy, nested: bool) -> None:
    plain = Transformer()
    model = _fsdp1(
        copy.deepcopy(plain),
        use_orig_params=use_orig_params,
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Block}) if nested else None,
    )
    for _ in range(2):
        model.zero_grad()
        plain.zero_grad()
        backward(model)
        backward(plain)
        check(paramstats.summarize(model), dict(plain.named_parameters()), rel=1e-5)
    model.eval()
    with torch.no_grad():
        model(tokens())
    summary = paramstats.summarize(model)
    assert summary["embedding.weight"].count == 13 * 8
    assert summary["embedding.weight"].aliases == ("head.weight",)
    if use_orig_params:
        for name in dict(model.named_parameters()):  # with `_fsdp_wrapped_module.`
            plain_name = name.replace("_fsdp_wrapped_module.", "")
            assert name != plain_name and summary[name] == summary[plain_name]
        model.zero_grad()
        assert paramstats.summarize(model)["norm.weight"].grad is None


@pytest.mark.parametrize(
    ("ranks", "use_orig_params", "strategy", "nested"),
    [
        (2, True, ShardingStrategy.FULL_SHARD, True),
        (2, True, ShardingStrategy.FULL_SHARD, False),
        (2, False, ShardingStrategy.FULL_SHARD, True),
        (2, False, ShardingStrategy.FULL_SHARD, False),
        (4, True, ShardingStrategy.SHARD_GRAD_OP, True),
        (2, True, ShardingStrategy.NO_SHARD, True),
    ],
)
def test_fsdp1(ranks, use_orig_params, strategy, nested):
    run_on_ranks(ranks, _train_fsdp1, use_orig_params, strategy, nested)


@pytest.mark.parametrize("use_orig_params", [True, False])
@on_ranks(2)
def test_fsdp1_before_forward_and_without_averaged_gradients(use_orig_params):
    plain = Transformer()
    model = _fsdp1(copy.deepcopy(plain), use_orig_params=use_orig_params)
    check(paramstats.summarize(model), dict(plain.named_parameters()), rel=1e-5)
    with model.no_sync():
        backward(model)
    assert all(entry.grad is None for entry in paramstats.summarize(model).values())


@on_ranks(2)
def test_fsdp1_with_frozen_parameters():
    plain = Transformer()
    plain.blocks.requires_grad_(False)
    model = _fsdp1(plain, use_orig_params=True)
    backward(model)
    for name, entry in paramstats.summarize(model).items():
        assert entry.requires_grad == (entry.grad is not None) == ("blocks" not in name)


@on_ranks(2)
def test_fsdp1_parameters_without_their_wrapper_are_refused():
    model = _fsdp1(Transformer(), use_orig_params=True)
    for source in (model.named_parameters(), model.module):
        with pytest.raises(NotImplementedError, match="pass the wrapped model"):
            paramstats.summarize(source)
    model = _fsdp1(Transformer(), sharding_strategy=ShardingStrategy.NO_SHARD)
    with pytest.raises(NotImplementedError, match="pass use_orig_params=True"):
        paramstats.summarize(model)


@pytest.mark.parametrize("wrap", ["fsdp1", "fsdp1 flat", "fsdp2"])
@on_ranks(2)
def test_activation_checkpointing_keeps_plain_names_and_answers_to_both(wrap):
    model = Transformer()
    plain_names = list(dict(model.named_parameters()))
    policy = ModuleWrapPolicy({Block})
    if wrap != "fsdp2":
        model = _fsdp1(model, use_orig_params=wrap == "fsdp1", auto_wrap_policy=policy)
    checkpoint_wrapper.apply_activation_checkpointing(model, auto_wrap_policy=policy)
    if wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    backward(model)
    names = [name for name, _ in model.named_parameters() if "_checkpoint_wrapped_module." in name]
    assert names
    for options in ({}, {"include": "up", "local": True}, {"async_op": True}):
        summary = paramstats.summarize(model, **options)
        assert sorted(summary) == sorted(n for n in plain_names if n in summary)
        up = summary["blocks.1.up.weight"]
        assert summary.is_local or up.count == up.grad.count == 256
        if wrap != "fsdp1 flat":
            (name,) = (n for n in names if "blocks.1." in n and n.endswith(".up.weight"))
            assert summary[name] == up
    assert set(paramstats.summarize(model)) == set(plain_names)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
@on_ranks(2, own_processes=True)
def test_zero_2_and_zero_3():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Otherwise it compiles collectives in shared memory into a folder of the user's, where it
    # waits forever for a process that was killed meanwhile.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    for stage in (2, 3):
        plain = Transformer(tied=False)
        engine, *_ = deepspeed.initialize(
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
        loss = nn.functional.cross_entropy(engine(batch).flatten(0, 1), batch.flatten())
        engine.backward(loss)
        summary = paramstats.summarize(engine)
        if stage == 3:
            backward(plain)
            check(summary, dict(plain.named_parameters()), rel=1e-5)
        else:
            for name, p in plain.named_parameters():
                oracle.check(summary[name], p)
                assert summary[name].grad is None or summary[name].grad.count == p.numel()
        assert summary == paramstats.summarize(engine.module)
        assert summary["module.norm.weight"] == summary["norm.weight"]
        engine.step()
        error = NotImplementedError if stage == 3 else ValueError  # its optimizer has flat tensors
        with pytest.raises(error, match=r"expected plain tensors|expected an optimizer of these"):
            paramstats.summarize(engine, optimizer=engine.optimizer)
