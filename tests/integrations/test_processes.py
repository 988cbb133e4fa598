"""Several processes: all take part, the first one logs."""

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
from tests.integrations.moments import Logged, moment, network, scalars_of
from tests.sharded.models import Transformer, backward
from tests.sharded.together import together


def _averaged(model: nn.Module) -> None:
    """What DDP does with gradients, by hand."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def _ddp() -> tuple[list[int], list[int]]:
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
        _averaged(plain)
        expected[step] = moment(plain)
        watcher.step()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1e-3)
    assert watcher.summary.scalars() == scalars_of(expected[2])
    if dist.get_rank() == 0:
        logged.check({step: expected[step] for step in (0, 2)})
    return list(logged), list(kept)


def test_ddp():
    assert together(2, _ddp) == [([0, 2], [0, 2]), ([], [])]


def _sharded(async_op: bool) -> list[int]:
    plain = Transformer()
    model = copy.deepcopy(plain)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    logged = Logged()
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
        assert repr(logged[4]) == repr(summary.scalars())  # NaN is NaN there
    return list(logged)


@pytest.mark.parametrize("async_op", [False, True])
def test_sharded(async_op):
    assert together(2, _sharded, async_op) == [[0, 2, 4], []]


def _after_backward() -> None:
    """What the callback for transformers relies on (accelerate shards nothing on CPUs)."""
    model = Transformer()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    taken = []
    for _ in range(2):  # the second adds to the first's gradients
        hooks = AfterBackward(model.parameters(), lambda: taken.append(paramstats.summarize(model)))
        backward(model)
        hooks.remove()
        assert taken.pop() == paramstats.summarize(model) and not taken


def test_the_end_of_a_sharded_backward():
    together(2, _after_backward)


def _transformers(folder: str) -> list[int]:
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate takes all cores for each process
    from tests.integrations import test_transformers as by_trainer

    logged = Logged()
    model = by_trainer.gpt2()
    trainer = by_trainer.trainer_of(
        folder, model, by_trainer.ParamStatsCallback(every=2, log=logged),
        gradient_accumulation_steps=2, max_grad_norm=1e-3,
    )  # fmt: skip
    trainer.train()
    if dist.get_rank() == 0:
        logged.check({step: trainer.moments[step] for step in (1, 2, 4)})
    alike = [None, None]
    dist.all_gather_object(alike, trainer.callback_handler.callbacks[-2].watcher.summary.scalars())
    assert alike[0] == alike[1]
    return list(logged)


def test_ddp_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert together(2, _transformers, str(tmp_path)) == [[1, 2, 4], []]
