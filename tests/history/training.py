"""A training in float64 with AdamW whose updates and state are also computed by hand."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paramstats import History, summarize

BETAS, EPS = (0.9, 0.99), 1e-3
WITHOUT = (2, 3)
"""Steps at which the summary is taken without the optimizer."""


class Truth(NamedTuple):
    """A parameter after a step."""

    param: Tensor
    grad: Tensor
    update: Tensor
    """The difference of the parameter."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    root: Tensor
    """The square root of the bias-corrected second moment."""

    def derived(self) -> dict[str, float]:
        """Return the numbers of two tensors by the names of `Summary.to_pandas`."""
        lag = (self.grad / torch.maximum(self.root, torch.full_like(self.root, EPS))).square()
        out = {
            "update_ratio": self.update.norm() / self.param.norm(),
            "update_cosine_grad": torch.dot(_unit(self.update), _unit(self.grad)),
            "grad_cosine_exp_avg": torch.dot(_unit(self.grad), _unit(self.exp_avg)),
            "optimizer_rms": lag.mean().sqrt(),
            "optimizer_eps_fraction": (self.root < EPS).double().mean(),
        }
        return {name: value.item() for name, value in out.items()}


def _unit(x: Tensor) -> Tensor:
    return x / x.norm()


def merged(truths: list[Truth]) -> Truth:
    """Return all parameters as one."""
    return Truth(*map(torch.cat, zip(*truths, strict=True)))


def train(history: History, steps: int = 6) -> list[dict[str, Truth]]:
    """Append a summary after each step of a training; return what it must contain.

    The model has a frozen parameter and buffers. Elements of the embedding have no gradient yet.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    model[2].bias.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.1)
    gradients: dict[str, list[Tensor]] = {name: [] for name in trained}
    truths = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        before = copy.deepcopy(trained)
        optimizer.zero_grad()
        (model(torch.randint(9, (6,))) * torch.randn(6, 3)).sum().backward()
        optimizer.step()
        truths.append({})
        for name, p in trained.items():
            assert p.grad is not None
            gradients[name].append(p.grad.flatten().clone())
            ages = torch.arange(step, -1, -1, dtype=torch.float64)[:, None]
            g = torch.stack(gradients[name])
            m, v = (
                ((1 - beta) * beta**ages * x).sum(0)
                for beta, x in zip(BETAS, (g, g.square()), strict=True)
            )
            new = p.detach().flatten().clone()
            root = (v / (1 - BETAS[1] ** (step + 1))).sqrt()
            truths[-1][name] = Truth(new, g[-1], new - before[name].detach().flatten(), m, v, root)
        known: Any = None if step in WITHOUT else optimizer
        history.append(step, summarize(model, optimizer=known, buffers=True))
    return truths
