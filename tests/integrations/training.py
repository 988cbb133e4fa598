"""A small network on real data, snapshots of its gradients, and the scalars expected for them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import paramstats
from tests import oracle

Snapshot = dict[str, Tensor]


@functools.lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 images of 8 x 8 pixels and their labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    data = datasets.load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def loss(model: nn.Module, batch: int, size: int = 32) -> Tensor:
    images, labels = (x[batch * size :][:size] for x in digits())
    return nn.functional.cross_entropy(model(images), labels)


def snapshot(model: nn.Module, grad_scale: float = 1.0) -> Snapshot:
    """Return copies of the parameters, with copies of their gradients divided by `grad_scale`."""
    copies = {}
    for name, p in model.named_parameters():
        copies[name] = p.detach().clone().requires_grad_(p.requires_grad)
        if p.grad is not None:
            copies[name].grad = p.grad.detach() / grad_scale
    return copies


def scalars_of(copies: Snapshot) -> dict[str, float]:
    """Return the scalars of a snapshot, after checking its statistics against the oracle.

    A watcher must log exactly these, because the scales in these tests are powers of two.
    """
    summary = paramstats.summarize(copies)
    for name, copy in copies.items():
        oracle.check(summary[name], copy)
        assert (summary[name].grad is None) == (copy.grad is None)
        if copy.grad is not None:
            oracle.check(summary[name].grad, copy.grad)
    return summary.scalars()


class Logged(dict[int, dict[str, float]]):
    """A log function that keeps the scalars by step; it accepts only increasing steps."""

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        assert not self or step > max(self), f"step {step} after {max(self)}"
        self[step] = scalars

    def check(self, snapshots: dict[int, Snapshot]) -> None:
        """Check that the scalars of these snapshots were logged, at their steps, and no others."""
        assert list(self) == list(snapshots)
        for step, copies in snapshots.items():
            expected = scalars_of(copies)
            assert any(key.startswith("grad_norm/") for key in expected)
            assert self[step] == expected, f"step {step}"
