"""A model to shard, and checks of its statistics against whole tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import paramstats
from paramstats._summary import record_of
from tests import oracle


class Transformer(nn.Module):
    """Two blocks between tied embeddings. No dimension is divisible by all numbers of ranks."""

    def __init__(self, width: int = 8, tied: bool = True, words: int = 13) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(1))  # fewer elements than ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x))))


def tensor_parallel(mesh) -> Transformer:
    """Return a model with tensor parallelism, whose norms have partial gradients."""
    model = Transformer(tied=False, words=14)
    for block in model.blocks:
        del block.scale  # SequenceParallel does not mix plain parameters with DTensors
        block.scale = 1.0
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def tokens(words: int = 13) -> torch.Tensor:
    """Return the same batch on every rank."""
    return torch.randint(words, (2, 6), generator=torch.Generator().manual_seed(7))


def backward(model: nn.Module, batch: torch.Tensor | None = None) -> None:
    batch = tokens() if batch is None else batch
    logits = model(batch)
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.flatten()).backward()


def sharded(values: torch.Tensor) -> DTensor:
    """Return a DTensor with the rows of `values` on all ranks."""
    return distribute_tensor(values, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def check(
    summary: paramstats.Summary, named: dict[str, torch.Tensor], rel: float | None = None
) -> None:
    """Check all statistics against the whole tensors and gradients, and that all ranks agree.

    With `rel`, gradients may differ by this, and the order of tensors does not count.
    """
    assert (list if rel is None else sorted)(named) == (list if rel is None else sorted)(summary)
    assert not summary.diverged and not summary.skipped
    for name, tensor in named.items():
        entry = summary[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype), name
        full, grad = (
            x.full_tensor() if isinstance(x, DTensor) else x for x in (tensor.detach(), tensor.grad)
        )
        oracle.check(entry, full)
        assert (entry.grad is None) == (grad is None), name
        if grad is not None and rel is None:
            oracle.check(entry.grad, grad.detach())
        elif grad is not None:
            assert entry.grad.count == grad.numel()
            assert entry.grad.norm == pytest.approx(grad.norm().item(), rel=rel), name
            assert entry.grad.max == pytest.approx(grad.max().item(), rel=rel, abs=1e-7), name
    check_same_on_all_ranks(summary)


def statistics(summary: paramstats.Summary) -> bytes:
    """Return all that must be equal on every rank, to the last bit."""
    record = record_of(summary)
    return repr((list(summary), dict(summary.diverged))).encode() + record.table


def check_same_on_all_ranks(summary: paramstats.Summary) -> None:
    assert len(set(gathered(statistics(summary)))) == 1


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def collective_calls(call: Callable[[], object]) -> int:
    """Return how many collective calls `call` makes on this rank."""
    names = [name for name in vars(dist) if name.startswith(("all_", "broadcast", "barrier"))]
    with contextlib.ExitStack() as stack:
        mocks = [
            stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            for name in names
        ]
        call()
    return sum(counted.call_count for counted in mocks)


def messages_of(call: Callable[[], object]) -> set[str]:
    """Return the different errors that `call` raises on the ranks."""
    try:
        call()
        message = "no error"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return set(gathered(message))
