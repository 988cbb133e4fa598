"""The state and the updates of optimizers of sharded models, against whole tensors in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import paramstats
from paramstats._core import backend as backends
from paramstats._core.optimizer_state import without_gradient
from paramstats._core.optimizers import Request
from paramstats._summary import record_of
from tests import oracle
from tests.sharded.models import (
    Transformer,
    backward,
    check_same_on_all_ranks,
    collective_calls,
    gathered,
    messages_of,
    sharded,
    tensor_parallel,
    tokens,
)
from tests.sharded.ranks import on_ranks, run_on_ranks

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adam loop": lambda params: torch.optim.Adam(params, lr=0.01, foreach=False, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}


def full(x: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor; a collective call for a DTensor."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Make three steps; return the whole parameters and copies from before the last."""
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, batch)
        before = {name: full(p).clone() for name, p in named(model).items()}
        copies = {id(p): p.detach().clone() for p in model.parameters()}
        optimizer.step()
    return before, copies


def check_optimizer(
    summary: paramstats.Summary,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    before: dict[str, torch.Tensor],
    method: str,
) -> None:
    """Check the state, the update and the products of all parameters."""
    for name, p in named(model).items():
        entry, state = summary[name], {key: full(x) for key, x in optimizer.state[p].items()}
        of_optimizer = entry.optimizer
        assert of_optimizer.hyperparameters["lr"] == optimizer.param_groups[0]["lr"], name
        assert list(of_optimizer.state) == list(state), name
        for key, x in state.items():
            oracle.check(of_optimizer.state[key], x)
        w, old = full(p).double(), before[name].double()
        dw, g = w - old, full(p.grad).double()
        assert of_optimizer.update_method == method, name
        assert entry.update.count == dw.numel()
        # The formula gives the update before the new weight is rounded.
        rounding = w.abs().max().item() * 2**-24 if method == "formula" else 0
        tolerance = 1e-6 * dw.square().mean().sqrt().item() + rounding
        assert entry.update.rms == pytest.approx(dw.square().mean().sqrt().item(), abs=tolerance)
        assert entry.update.mean == pytest.approx(dw.mean().item(), abs=tolerance)
        assert entry.update.max == pytest.approx(dw.max().item(), abs=2 * tolerance)
        assert entry.update.min == pytest.approx(dw.min().item(), abs=2 * tolerance)
        if method == "copy":
            assert entry.update.zero_count == int((dw == 0).sum()), name
        key = of_optimizer.momentum
        m = state[key].double()
        assert of_optimizer.cosine("grad", key) == pytest.approx(_cosine(g, m), abs=1e-6), name
        got = of_optimizer.cosine("update", "grad")
        assert got == pytest.approx(_cosine(dw, g), abs=1e-6 + 1e2 * rounding), name
        if "exp_avg_sq" in state:
            group = optimizer.param_groups[0]
            v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
            v = v / (1 - group["betas"][1] ** state["step"].item())
            lag = (g.square() / v.clamp(min=group["eps"] ** 2)).mean().sqrt().item()
            assert of_optimizer.rms == pytest.approx(lag, rel=1e-6), name
            small = (v.sqrt() < group["eps"]).double().mean().item()
            assert of_optimizer.eps_fraction == small, name
    assert not summary.skipped and not summary.diverged
    check_same_on_all_ranks(summary)
    record = record_of(summary).optimizer
    assert len(set(gathered(repr(record)))) == 1


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    size = (a.norm() * b.norm()).item()
    return (a * b).sum().item() / size if size else math.nan


def _train_and_check(kind: str, dtype: torch.dtype, backend: str) -> None:
    before = backends.active()
    backends._active = backends.choose(backend)
    try:
        model = Transformer().to(dtype)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = OPTIMIZERS[kind](model.parameters())
        old, copies = train(model, optimizer)
        if kind != "sgd" and dtype == torch.float32:
            summary = paramstats.summarize(model, optimizer=optimizer)
            check_optimizer(summary, model, optimizer, old, "formula")
            assert summary["norm.bias"].optimizer.step == 3
            later = paramstats.summarize(model, optimizer=optimizer, async_op=True)
            assert later == summary
        request = Request((optimizer,), copies, idle=without_gradient(optimizer))
        summary = paramstats.summarize(model, optimizer=request)
        check_optimizer(summary, model, optimizer, old, "copy")
        only_grads = paramstats.summarize(model, params=False, optimizer=request)
        assert not only_grads["norm.bias"].is_read()
        assert only_grads["norm.bias"].update == summary["norm.bias"].update
    finally:
        backends._active = before


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("ranks", "kind", "dtype"),
    [
        (2, "adamw", torch.float32),
        (3, "adamw", torch.float32),
        (2, "adamw fused", torch.float32),
        (2, "adam loop", torch.float32),
        (3, "adamw", torch.bfloat16),
        (2, "sgd", torch.float32),
        (3, "sgd", torch.bfloat16),
    ],
)
def test_fully_shard(ranks, kind, dtype, backend):
    run_on_ranks(ranks, _train_and_check, kind, dtype, backend)


@on_ranks(4)
def test_hybrid_sharding_counts_replicas_once_and_compares_them():
    model = Transformer()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before, _ = train(model, optimizer)
    check_optimizer(
        paramstats.summarize(model, optimizer=optimizer), model, optimizer, before, "formula"
    )
    if dist.get_rank() == 3:
        optimizer.state[model.norm.weight]["exp_avg"].to_local()[0] += 1.0
        optimizer.param_groups[0]["lr"] = 0.5
    summary = paramstats.summarize(model, optimizer=optimizer)
    assert summary.diverged["norm.weight (exp_avg)"] == "rank 3 differs from rank 1"
    assert summary.diverged["embedding.weight (lr)"] == "rank 3 differs from rank 2"
    assert "norm.weight (update)" in summary.diverged
    assert "norm.bias (exp_avg)" not in summary.diverged
    check_same_on_all_ranks(summary)


@on_ranks(2)
def test_products_with_partial_gradients_are_not_read():
    model = tensor_parallel(init_device_mesh("cpu", (2,)))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before, _ = train(model, optimizer, tokens(14))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = paramstats.summarize(model, optimizer=optimizer)
    others = {name for name, p in named(model).items() if p.grad.placements != p.placements}
    keys = ("gradient * momentum", "update * gradient", "lag")
    assert set(summary.skipped) == {f"{name} ({key})" for name in others for key in keys}
    reason = "the gradient is placed as (Partial(sum),), the parameter as (Replicate(),)"
    assert summary.skipped["norm.weight (lag)"] == reason
    for name, p in named(model).items():
        entry, dw = summary[name], full(p).double() - before[name].double()
        rounding = full(p).abs().max().item() * 2**-24
        size = dw.square().mean().sqrt().item()
        assert entry.update.rms == pytest.approx(size, abs=1e-6 * size + rounding), name
        got = entry.optimizer.cosine("grad", "exp_avg"), entry.optimizer.rms
        assert all(math.isnan(x) == (name in others) for x in got), name
    check_same_on_all_ranks(summary)


@on_ranks(3)
def test_local_statistics_are_those_of_the_parts():
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (3,)))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    _, copies = train(model, optimizer)
    request = Request((optimizer,), copies, idle=without_gradient(optimizer))
    summaries = []

    def summarize():
        summaries.append(paramstats.summarize(model, optimizer=request, local=True))

    assert collective_calls(summarize) == 0
    (summary,) = summaries
    assert summary.is_local
    for name, p in named(model).items():
        entry, local = summary[name], p.to_local().detach()
        oracle.check(entry.optimizer.state["momentum_buffer"], _local_buffer(optimizer, p))
        dw = local.double() - copies[id(p)].to_local().double()
        assert entry.update.count == local.numel()
        assert entry.update.norm == pytest.approx(dw.norm().item(), rel=1e-6)
    assert summary["norm.bias"].optimizer.lr == 0.1


def _local_buffer(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> torch.Tensor:
    return optimizer.state[p]["momentum_buffer"].to_local()


@on_ranks(2)
def test_one_collective_call_also_if_gradients_change():
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    for name in (None, "norm.bias", "norm.weight"):
        for p in model.parameters():
            p.grad = None if p is named(model).get(name) else p.detach().clone()
        request = Request((optimizer,), idle=without_gradient(optimizer))
        if name is None:
            paramstats.summarize(model, optimizer=request)  # the ranks agree
        summaries = []
        assert collective_calls(lambda r=request, s=summaries: _append(s, model, r)) == 1
        entry = summaries[0][name or "embedding.weight"]
        assert entry.optimizer.update_method == ("no gradient" if name else "formula")
        assert (entry.update.zero_fraction == 1) == (name is not None)


def _append(summaries: list[paramstats.Summary], model: nn.Module, request: Request) -> None:
    summaries.append(paramstats.summarize(model, optimizer=request))


@on_ranks(2)
def test_pipeline_stages_have_optimizers_of_their_own():
    rank = dist.get_rank()
    stage = {f"stage{rank}.w": nn.Parameter(torch.arange(1.0, 5.0 + rank))}
    (w,) = stage.values()
    w.grad = torch.ones_like(w)
    optimizer = (
        torch.optim.SGD([w], lr=0.1, momentum=0.5) if rank else torch.optim.AdamW([w], lr=0.2)
    )
    optimizer.step()
    summary = paramstats.summarize(stage, optimizer=optimizer, group=dist.group.WORLD)
    first, second = summary["stage0.w"].optimizer, summary["stage1.w"].optimizer
    assert (first.lr, second.lr) == (0.2, 0.1) and second.hyperparameters["momentum"] == 0.5
    assert list(first.state) == ["step", "exp_avg", "exp_avg_sq"] and first.step == 1
    assert list(second.state) == ["momentum_buffer"]
    assert (first.update_method, second.update_method) == ("formula", None)
    assert summary["stage0.w"].update.count == 4 and summary["stage1.w"].update is None
    assert second.cosine("grad", "momentum_buffer") == pytest.approx(1)
    assert not summary.skipped and not summary.diverged
    check_same_on_all_ranks(summary)
    assert len(set(gathered(repr(record_of(summary).optimizer)))) == 1


@on_ranks(2)
def test_ddp_does_not_communicate_and_zero_redundancy_has_the_state_of_its_rank():
    model = Transformer()
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=0.01)
    before, copies = train(wrapped, optimizer)
    before = {name.removeprefix("module."): x for name, x in before.items()}
    summaries = []
    assert collective_calls(lambda: _append(summaries, wrapped, optimizer)) == 0
    names = [name for name, entry in summaries[0].items() if "exp_avg" in entry.optimizer.state]
    both = gathered(names)
    assert sorted(both[0] + both[1]) == sorted(named(model)) and all(both)
    # Its updates are not found by the formula, which only this rank could compute.
    assert all(entry.update is None for entry in summaries[0].values())
    copied = paramstats.summarize(wrapped, optimizer=Request((optimizer,), copies, True))
    for name, p in named(model).items():
        dw = p.detach().double() - before[name].double()
        assert copied[name].update.norm == pytest.approx(dw.norm().item(), rel=1e-6)
    # With a group, the ranks together have the state of all parameters.
    whole = paramstats.summarize(wrapped, optimizer=optimizer, group=dist.group.WORLD)
    assert all(entry.optimizer.state["exp_avg"].is_read() for entry in whole.values())
    check_same_on_all_ranks(whole)


@on_ranks(2)
def test_unsupported_models_are_refused_on_all_ranks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this wrapper
        model = FullyShardedDataParallel(Transformer(), device_id="cpu", use_orig_params=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    w = nn.Parameter(torch.ones(2))
    part = {"w": paramstats.LocalShard(w, dist.get_rank(), 4)}
    for source, of in ((model, optimizer), (part, torch.optim.SGD([w]))):
        for call in (
            lambda s=source, o=of: paramstats.summarize(s, optimizer=o),
            lambda s=source, o=of: paramstats.watch(s, print, optimizer=o),
        ):
            (message,) = messages_of(call)
            assert "NotImplementedError" in message and "use fully_shard" not in message
            assert "leave out optimizer=, or shard the model with fully_shard" in message
    assert paramstats.summarize(model).total.count


@on_ranks(2)
def test_wrong_or_missing_optimizer_on_one_rank():
    model = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (2,)))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    given = [optimizer, "adamw"][dist.get_rank()]
    messages = messages_of(lambda: paramstats.summarize(model, optimizer=given))
    assert any("got an error on rank 1" in message for message in messages)
    assert any("TypeError" in message and "'adamw'" in message for message in messages)
    given = [optimizer, None][dist.get_rank()]
    with pytest.warns(RuntimeWarning, match="the ranks together have"):
        summary = paramstats.summarize(model, optimizer=given)
    assert summary.skipped["weight (exp_avg)"] == "the ranks together have 9 of its 15 elements"
    assert math.isnan(summary["weight"].update.norm) and summary["weight"].is_read()
    check_same_on_all_ranks(summary)
    assert paramstats.summarize(model, optimizer=optimizer)["weight"].update.is_read()


@on_ranks(2)
def test_plain_tensors_in_the_state_of_a_dtensor():
    rank = dist.get_rank()
    p = nn.Parameter(sharded(torch.arange(15.0).view(5, 3)))
    local, mesh = p.to_local().detach(), p.device_mesh
    optimizer = torch.optim.SGD([p], lr=0.1)
    moved = distribute_tensor(torch.ones(5, 3), mesh, [Shard(1)])
    optimizer.state[p] = {
        "like the shard": local + 1,
        "scalar": torch.tensor(2.5),
        "number": 7,
        "whole": torch.ones(5, 3),
        "momentum_buffer": moved,
        "replicated": distribute_tensor(torch.ones(4), mesh, [Replicate()]),
        "unknown": torch.ones(5 + rank),
    }
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = paramstats.summarize(
            {"p": p}, optimizer=Request((optimizer,), {id(p): p.detach() - 1})
        )
    state = summary["p"].optimizer.state
    oracle.check(state["like the shard"], torch.arange(15.0) + 1)
    assert (state["scalar"].mean, state["number"].mean) == (2.5, 7)
    assert [state[key].count for key in ("whole", "momentum_buffer", "replicated")] == [15, 15, 4]
    assert not state["unknown"].is_read()
    assert "a plain tensor of shape" in summary.skipped["p (unknown)"]
    reason = "the state or the copy has other placements than the parameter"
    assert summary.skipped["p (gradient * momentum)"] == reason
    assert not summary["p"].update.is_read() and summary["p"].optimizer.update_method is None
    check_same_on_all_ranks(summary)
    del optimizer.state[p]["momentum_buffer"], optimizer.state[p]["unknown"]
    for copy in (p.detach() - 1, local - 1):
        request = Request((optimizer,), {id(p): copy})
        update = paramstats.summarize({"p": p}, optimizer=request)["p"].update
        assert (update.mean, update.std, update.count) == (1, 0, 15)


@pytest.mark.parametrize("several", [False, True])
@on_ranks(2)
def test_watch_of_fully_shard(several):
    model = Transformer()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    params = list(named(model).values())
    halves = [params[::2], params[1::2]] if several else [params]
    optimizers = [torch.optim.SGD(half, lr=0.1, momentum=0.9) for half in halves]
    model(tokens())
    assert not any(p is q for p, q in zip(params, model.parameters(), strict=True))  # gathered
    watcher = paramstats.watch(model, lambda *_: None, every=2, optimizer=optimizers)
    for step in range(3):
        model.zero_grad()
        backward(model)
        before = {name: full(p).double() for name, p in named(model).items()}
        for optimizer in optimizers:
            optimizer.step()
        if step % 2:
            continue
        assert set(watcher.summary) == set(before)
        for name, p in named(model).items():
            dw = full(p).double() - before[name]
            assert watcher.summary[name].update.norm == pytest.approx(dw.norm().item(), rel=1e-6)
        check_same_on_all_ranks(watcher.summary)
    watcher.close()
