"""A small network on real data, snapshots of its gradients, and the scalars expected for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

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


class Step(NamedTuple):
    """What an optimizer has done: copies of its parameters, by name, from before and after."""

    old: Snapshot
    new: Snapshot
    state: dict[str, dict[str, Tensor]]
    group: dict[str, Any]

    def scalars(self) -> dict[str, float]:
        """Return the scalars of this step, without totals."""
        tensors = {"param": self.new}
        tensors["update"] = {n: w.detach().double() - self.old[n] for n, w in self.new.items()}
        for name, state in self.state.items():
            for key, value in state.items():
                if key != "step":
                    tensors.setdefault(key, {})[name] = value
        found = {}
        for kind, named in tensors.items():
            key = "{kind}_{stat}/{name}" if kind == "param" else f"{kind}_{{stat}}/{{name}}"
            found |= paramstats.summarize(named).scalars(key=key, totals=False)
        for name, w in self.new.items():
            g, dw, state = w.grad.double(), tensors["update"][name], self.state[name]
            found[f"update_ratio/{name}"] = (dw.norm() / w.norm()).item()
            found[f"update_cosine_grad/{name}"] = _cosine(dw, g)
            for key in {"exp_avg", "momentum_buffer"} & state.keys():
                found[f"grad_cosine_{key}/{name}"] = _cosine(g, state[key].double())
            if {"exp_avg", "exp_avg_sq"} <= state.keys():
                correction = 1 - self.group["betas"][1] ** state["step"].item()
                root, eps = (state["exp_avg_sq"].double() / correction).sqrt(), self.group["eps"]
                lag = (g / root.clamp(min=eps)).square().mean().sqrt()
                found[f"optimizer_rms/{name}"] = lag.item()
                found[f"optimizer_eps_fraction/{name}"] = (root < eps).double().mean().item()
        return found


class StepTruth:
    """The steps of some optimizers: `steps[i][n]` is step n of optimizer i."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.steps: list[list[Step]] = [[] for _ in optimizers]
        for optimizer, steps in zip(optimizers, self.steps, strict=True):
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = {name: p for name, p in model.named_parameters() if id(p) in ids}
            optimizer.register_step_pre_hook(functools.partial(self._before, named))
            optimizer.register_step_post_hook(functools.partial(self._after, named, steps))

    def _before(self, named: Snapshot, *_: object) -> None:
        self._old = _copied(named)

    def _after(
        self, named: Snapshot, steps: list[Step], optimizer: torch.optim.Optimizer, *_: object
    ) -> None:
        new = _copied(named)
        for name, p in named.items():
            new[name].grad = p.grad.clone()
        state = {name: _copied(optimizer.state[p]) for name, p in named.items()}
        steps.append(Step(self._old, new, state, optimizer.param_groups[0]))

    def check(self, logged: Mapping[int, dict[str, float]], numbers: Mapping[int, int]) -> None:
        """Check what was logged, apart from totals.

        Args:
            logged: the scalars by the number under which they were logged.
            numbers: that number, and which step of each optimizer it has.
        """
        assert list(logged) == list(numbers)
        for number, n in numbers.items():
            expected = {}
            for steps in self.steps:
                expected |= steps[n].scalars()
            assert any(key.startswith("update_norm/") for key in expected)
            found = {key: x for key, x in logged[number].items() if not key.endswith("/total")}
            assert found.keys() == expected.keys()
            for key, x in expected.items():
                is_update = key.startswith("update_")  # Adam's formula rounds otherwise than Adam
                near = {"rel": 2e-5, "abs": 1e-8} if is_update else {"rel": 1e-6, "abs": 1e-12}
                assert found[key] == pytest.approx(x, **near, nan_ok=True), f"{key} at {number}"


def _copied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key: torch.as_tensor(value).detach().clone() for key, value in tensors.items()}


def _cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / a.norm() / b.norm()).item()


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
