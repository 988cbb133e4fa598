"""Sharded models, and what their statistics must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import paramstats
from paramstats._summary import record_of
from tests import oracle


class Transformer(nn.Module):
    """Two blocks of attention and MLP between tied embeddings; no dimension divides by all."""

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
        self.scale = nn.Parameter(torch.ones(1))  # fewer rows than processes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x))))


def tokens(words: int = 13) -> torch.Tensor:
    """The same on every process."""
    return torch.randint(words, (2, 6), generator=torch.Generator().manual_seed(7))


def backward(model: nn.Module, batch: torch.Tensor | None = None) -> None:
    batch = tokens() if batch is None else batch
    logits = model(batch)
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.flatten()).backward()


def whole(x: Any) -> torch.Tensor:
    """All elements of a DTensor, by torch's own collectives."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def check(summary: paramstats.Summary, named: dict[str, torch.Tensor]) -> None:
    """Asserts all statistics against whole tensors, which are gathered here, and their gradients."""
    assert list(summary) == list(named)
    assert not summary.diverged and not summary.skipped
    for name, tensor in named.items():
        entry = summary[name]
        assert entry.shape == tuple(tensor.shape), name
        full = whole(tensor.detach())
        assert entry.dtype == full.dtype, name
        oracle.check(entry, full)
        grad = tensor.grad
        assert (entry.grad is None) == (grad is None), name
        if grad is not None:
            oracle.check(entry.grad, whole(grad.detach()))


def statistics(summary: paramstats.Summary) -> bytes:
    """All that must be the same on every process, to the last bit."""
    summary.wait()
    return repr((list(summary), dict(summary.diverged))).encode() + record_of(summary).table
