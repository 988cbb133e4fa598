"""Watching on several ranks: all ranks take part in an exchange, and rank 0 logs."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import paramstats
from paramstats.integrations._after_backward import AfterBackward
from tests.integrations.training import Logged, network, scalars_of, snapshot
from tests.sharded.models import Transformer, backward, gathered
from tests.sharded.ranks import on_ranks, run_on_ranks


def _average_gradients(model: nn.Module) -> None:
    """Average gradients over ranks, as DDP does."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


@on_ranks(2)
def test_rank_0_logs_under_ddp():
    plain = network()
    ddp = DistributedDataParallel(copy.deepcopy(plain))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    logged, kept, expected = Logged(), {}, {}

    class History:
        append = staticmethod(kept.__setitem__)

    watcher = paramstats.watch(ddp.module, logged, every=2, history=History())
    for step in range(4):
        for model in (plain, ddp):
            model.zero_grad()
            model(x).square().mean().backward()
        _average_gradients(plain)
        expected[step] = snapshot(plain)
        watcher.step()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1e-3)
    assert watcher.summary.scalars() == scalars_of(expected[2])
    if dist.get_rank() == 0:
        logged.check({step: expected[step] for step in (0, 2)})
    assert list(logged) == list(kept) == ([0, 2] if dist.get_rank() == 0 else [])


def _fully_sharded() -> Transformer:
    model = Transformer()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.parametrize("async_op", [False, True])
@on_ranks(2)
def test_sharded_model_is_watched_on_all_ranks(async_op):
    plain = Transformer()
    torch.manual_seed(0)
    model, logged = _fully_sharded(), Logged()
    with paramstats.watch(model, logged, every=2, async_op=async_op) as watcher:
        for _ in range(5):
            for each in (plain, model):
                each.zero_grad()
                backward(each)
            watcher.step()
    expected = paramstats.summarize(plain).scalars()
    summary = watcher.summary
    assert not summary.diverged
    assert summary.scalars() == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)
    if dist.get_rank() == 0:
        assert repr(logged[4]) == repr(summary.scalars())  # repr, because NaN != NaN
    assert list(logged) == ([0, 2, 4] if dist.get_rank() == 0 else [])


@on_ranks(2)
def test_hook_after_backward_runs_once_on_a_sharded_model():
    """The callback for transformers uses this hook; accelerate shards nothing on CPUs."""
    model = _fully_sharded()
    summaries = []
    for _ in range(2):  # the second backward adds to the gradients
        hooks = AfterBackward(
            model.parameters(), lambda: summaries.append(paramstats.summarize(model))
        )
        backward(model)
        hooks.remove()
        assert summaries.pop() == paramstats.summarize(model) and not summaries


def _train_with_transformers(folder: str) -> list[int]:
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise accelerate uses all cores for each rank
    from tests.integrations import test_transformers as single

    logged = Logged()
    trainer = single.trainer_of(
        folder, single.gpt2(), single.ParamStatsCallback(every=2, log=logged),
        gradient_accumulation_steps=2, max_grad_norm=1e-3,
    )  # fmt: skip
    trainer.train()
    if dist.get_rank() == 0:
        logged.check({step: trainer.snapshots[step] for step in (1, 2, 4)})
    watcher = trainer.callback_handler.callbacks[-2].watcher
    scalars = gathered(watcher.summary.scalars())
    assert scalars[0] == scalars[1]
    return list(logged)


def test_rank_0_logs_with_ddp_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    logged = run_on_ranks(2, _train_with_transformers, str(tmp_path), own_processes=True)
    assert logged == [[1, 2, 4], []]
