"""A small network on real data, snapshots of its gradients, and the scalars expected for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

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


def scalars_of(copies: Mapping[str, Tensor], **options: object) -> dict[str, float]:
    """Return the scalars of a snapshot, after checking its statistics against the oracle.

    A watcher must log exactly these, because the scales in these tests are powers of two.
    """
    summary = paramstats.summarize(copies)
    for name, copy in copies.items():
        oracle.check(summary[name], copy)
        assert (summary[name].grad is None) == (copy.grad is None)
        if copy.grad is not None:
            oracle.check(summary[name].grad, copy.grad)
    return summary.scalars(**options)


class StepTruth:
    """The scalars of every step of some optimizers, computed from what hooks of its own see.

    `steps[i][n]` are those of step n of optimizer i, without totals.
    """

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.steps: list[list[dict[str, float]]] = [[] for _ in optimizers]
        self._old: Snapshot = {}
        for optimizer, steps in zip(optimizers, self.steps, strict=True):
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = {name: p for name, p in model.named_parameters() if id(p) in ids}

            def before(*_: object, named: Snapshot = named) -> None:
                self._old = {name: p.detach().clone() for name, p in named.items()}

            def after(
                optimizer: torch.optim.Optimizer, *_: object, named=named, steps=steps
            ) -> None:
                steps.append(self._scalars(named, optimizer))

            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)

    def check(self, logged: Mapping[int, dict[str, float]], numbers: Mapping[int, int]) -> None:
        """Check what was logged without totals.

        Args:
            logged: the scalars by the number under which they were logged.
            numbers: that number, and which step of each optimizer it has.
        """
        assert list(logged) == list(numbers)
        for number, n in numbers.items():
            expected = {key: x for steps in self.steps for key, x in steps[n].items()}
            assert any(key.startswith("update_norm/") for key in expected)
            found = {key: x for key, x in logged[number].items() if not key.endswith("/total")}
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-9, nan_ok=True), number

    def _scalars(self, named: Snapshot, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return the scalars of the step that an optimizer has just made."""
        copies = {name: p.detach().clone() for name, p in named.items()}
        for name, copy in copies.items():
            copy.grad = named[name].grad.clone()
        found = scalars_of(copies, totals=False)
        for name, p in named.items():
            w, g = p.detach().double(), p.grad.double()
            dw = w - self._old[name].double()
            state, (group, *_) = optimizer.state[p], optimizer.param_groups
            tensors = {"update": dw}
            for key, value in state.items():
                if key != "step":
                    tensors[key] = torch.as_tensor(value).detach()
            for key, tensor in tensors.items():
                pattern = f"{key}_{{stat}}/{{name}}"
                found |= scalars_of({name: tensor.clone()}, key=pattern, totals=False)
            found[f"update_ratio/{name}"] = (dw.norm() / w.norm()).item()
            found[f"update_cosine_grad/{name}"] = _cosine(dw, g)
            for key in {"exp_avg", "momentum_buffer"} & state.keys():
                found[f"grad_cosine_{key}/{name}"] = _cosine(g, state[key].double())
            if {"exp_avg", "exp_avg_sq"} <= state.keys():
                correction = 1 - group["betas"][1] ** float(state["step"])
                root = (state["exp_avg_sq"].double() / correction).sqrt()
                lag = (g / root.clamp(min=group["eps"])).square().mean().item()
                found[f"optimizer_rms/{name}"] = math.sqrt(lag)
                small = root < group["eps"]
                found[f"optimizer_eps_fraction/{name}"] = small.double().mean().item()
        return found


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
