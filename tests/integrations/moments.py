"""What a model's parameters and gradients are at one moment, and what must be logged of it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import paramstats
from tests import oracle

Moment = dict[str, Tensor]


@functools.lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 images of 8 x 8, and what they show."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    found = datasets.load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def batch(number: int, size: int = 32) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[number * size :][:size], labels[number * size :][:size]


def loss(model: nn.Module, number: int) -> Tensor:
    images, labels = batch(number)
    return nn.functional.cross_entropy(model(images), labels)


def moment(model: nn.Module, grad_scale: float = 1.0) -> Moment:
    """Copies of the parameters, with copies of their gradients, which are unscaled here."""
    copies = {}
    for name, p in model.named_parameters():
        copies[name] = p.detach().clone().requires_grad_(p.requires_grad)
        if p.grad is not None:
            copies[name].grad = p.grad.detach() / grad_scale
    return copies


def scalars_of(copies: Moment) -> dict[str, float]:
    """What must be logged, once it is right by the textbook: of powers of two as scale, to the
    last digit."""
    summary = paramstats.summarize(copies)
    for name, copy in copies.items():
        oracle.check(summary[name], copy)
        assert (summary[name].grad is None) == (copy.grad is None)
        if copy.grad is not None:
            oracle.check(summary[name].grad, copy.grad)
    return summary.scalars()


class Logged(dict[int, dict[str, float]]):
    """A log: scalars by step; no step comes twice, none comes late."""

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        assert not self or step > max(self), f"step {step} after {max(self)}"
        self[step] = scalars

    def check(self, moments: dict[int, Moment]) -> None:
        assert list(self) == list(moments)
        for step, copies in moments.items():
            expected = scalars_of(copies)
            assert any(key.startswith("grad_norm/") for key in expected)
            assert self[step] == expected, f"step {step}"
