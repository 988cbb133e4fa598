"""Statistics of updates, and products with the gradient, against float64 differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import paramstats

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = 1e-6
"""Allowed error of a statistic, relative to the root mean square."""


class Lion(optim.Optimizer):
    """An optimizer of one's own, with a state and hyperparameters of its own."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                p.sub_(momentum.sign(), alpha=group["lr"])


def adam(kind: type = optim.AdamW, **options: Any) -> Callable[..., optim.Optimizer]:
    return lambda params, eps: kind(params, **{"lr": 0.01, "eps": eps, **options})


def other(kind: type, **options: Any) -> Callable[..., optim.Optimizer]:
    return lambda params, eps: kind(params, **options)


ADAMS = {
    "AdamW": adam(foreach=False),
    "AdamW(foreach)": adam(foreach=True),
    "AdamW(fused)": adam(fused=True),
    "AdamW(amsgrad)": adam(amsgrad=True),
    "AdamW(maximize)": adam(maximize=True),
    "AdamW(weight_decay=0)": adam(weight_decay=0),
    "AdamW(weight_decay=30)": adam(weight_decay=30),
    "AdamW(lr=tensor)": adam(lr=torch.tensor(0.01)),
    "Adam": adam(optim.Adam),
    "Adam(fused, weight_decay)": adam(optim.Adam, fused=True, weight_decay=0.1),
    "Adam(weight_decay)": adam(optim.Adam, weight_decay=0.1),
    "Adam(decoupled)": adam(optim.Adam, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam(tiny lr)": adam(optim.Adam, lr=1e-7),
}
OTHERS = {
    "SGD": other(optim.SGD, lr=0.1),
    "SGD(momentum)": other(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD(nesterov)": other(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adagrad": adam(optim.Adagrad),
    "RMSprop": lambda params, eps: optim.RMSprop(params, eps=eps, momentum=0.9, centered=True),
    "NAdam": adam(optim.NAdam),
    "Muon": other(optim.Muon),
    "Adafactor": other(optim.Adafactor),
    "Lion": other(Lion),
}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Return matrices of several kinds of data."""
    torch.manual_seed(0)
    shape = (24, 50)
    largest = 4 if dtype is torch.float16 else 6
    data = {
        "normal": torch.randn(shape),
        "small": 0.01 * torch.randn(shape),
        "zeros": torch.zeros(shape),
        "far from zero": 100 + torch.randn(shape),
        "orders": torch.randn(shape).sign() * 10 ** (torch.rand(shape) * (largest + 6) - 6),
        "one": torch.tensor([[-2.0]]),
    }
    return {name: nn.Parameter(x.to(dtype)) for name, x in data.items()}


def set_gradients(params: dict[str, nn.Parameter]) -> None:
    for number, p in enumerate(params.values()):
        p.grad = 10.0 ** -(2 * number) * torch.randn_like(p)
        p.grad[p.grad.abs() < 0.1 * p.grad.std(correction=0)] = 0


def watched(params: Any, optimizer: Any, **options: Any) -> paramstats.Watcher:
    return paramstats.watch(params, lambda *_: None, every=1, optimizer=optimizer, **options)


def doubled(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the parameters as copies in float64."""
    return {name: p.detach().clone().double() for name, p in params.items()}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check_update(stats: Any, dw: Tensor, slack: Tensor | float = 0.0) -> None:
    """Compare the statistics of an update with a float64 difference.

    `slack` is an allowed error of each element of dw.
    """
    error = torch.as_tensor(slack, dtype=torch.float64).expand(dw.shape)
    allowed = TOLERANCE * rms(dw) + rms(error) + 1e-300
    assert stats.count == dw.numel()
    assert abs(stats.mean - dw.mean().item()) <= allowed
    assert abs(stats.rms - rms(dw)) <= allowed
    assert abs(stats.norm - dw.norm().item()) <= allowed * math.sqrt(dw.numel())
    if dw.numel() > 1:
        assert abs(stats.std - dw.std().item()) <= 1.05 * allowed
    largest = dw.abs().max().item()
    assert abs(stats.abs_max - largest) <= TOLERANCE * largest + error.max().item()


def ulp(w: Tensor) -> Tensor:
    """Return the distance from each element to the next one away from zero, in float64."""
    info = torch.finfo(w.dtype)
    exponent = w.double().abs().clamp(min=info.smallest_normal).frexp().exponent - 1
    return info.eps * torch.ldexp(torch.ones_like(w, dtype=torch.float64), exponent)


def formula_error(w: Tensor, old: Tensor, dw: Tensor) -> Tensor:
    """Return a bound for each element of the formula's dw.

    The optimizer rounds the weight, its product with 1 - lr * weight decay, and that factor: half a
    unit in the last place each. All other operations have relative errors of dw itself.
    """
    largest = torch.maximum(w.double().abs(), old).to(w.dtype)
    return 1.5 * ulp(largest) + 16 * torch.finfo(w.dtype).eps * dw.abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ADAMS, *OTHERS])
def test_the_update_of_a_copy_is_exact(backend, name, dtype):
    params = parameters(dtype)
    eps = 1e-4 if dtype is torch.float16 else 1e-8
    optimizer = {**ADAMS, **OTHERS}[name](params.values(), eps=eps)
    watcher = watched(params, optimizer, update="copy")
    for _ in range(2):
        set_gradients(params)
        before = doubled(params)
        optimizer.step()
        for key, p in params.items():
            entry, dw = watcher.summary[key], p.detach().double() - before[key]
            assert entry.optimizer.update_method == "copy"
            check_update(entry.update, dw)
            assert entry.update.zero_count == int((dw == 0).sum())
            assert entry.update_ratio == pytest.approx(
                (dw.norm() / p.detach().double().norm()).item(), rel=2 * TOLERANCE, nan_ok=True
            )
            check_products(entry, p, dw, optimizer.state[p], optimizer.param_groups[0])
    assert len(watcher.summary) == len(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ADAMS)
def test_the_update_of_the_formula_has_the_rounding_error_of_the_weight(backend, name, dtype):
    """float16 has no bound: the second moments of small gradients are not representable in it."""
    params = parameters(dtype)
    optimizer = ADAMS[name](params.values(), eps=1e-8)
    # Torch rounds 1 - lr * weight decay to the dtype of lr, if it is a tensor: here float32.
    of_lr = 2**-24 if "tensor" in name else 0
    watcher = watched(params, optimizer, update="formula")
    for _ in range(2):
        set_gradients(params)
        before = doubled(params)
        optimizer.step()
        for key, p in params.items():
            entry, dw = watcher.summary[key], p.detach().double() - before[key]
            assert entry.optimizer.update_method == "formula"
            slack = formula_error(p.detach(), before[key].abs(), dw)
            check_update(entry.update, dw, slack + of_lr * before[key].abs())
            uncertain = may_be_lost(p.detach(), optimizer.state[p], optimizer.param_groups[0])
            lost = int((dw == 0).sum())
            assert abs(entry.update.zero_count - lost) <= uncertain, (key, lost)


def may_be_lost(w: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> int:
    """Return of how many elements it is not certain whether rounding has lost the update.

    An update is lost if it is below half the distance to the next number, so the elements where
    rounding errors of dw decide are those near that. With decoupled weight decay, optimizers round
    twice, so that a part of the update or all of it may be lost.
    """
    w64, lr = w.double(), float(group["lr"])
    root, moment = root_of_variance(state, group), state["exp_avg"].double()
    change = lr * moment / (1 - group["betas"][0] ** float(state["step"])) / (root + group["eps"])
    decay = lr * group["weight_decay"] * w64 if group["decoupled_weight_decay"] else 0 * w64
    size, exact, unit = change.abs() + decay.abs(), (change + decay).abs(), ulp(w)
    margin = 1e-5 if w.dtype in (torch.float32, torch.float64) else 0.05
    below = unit.where(w64.frexp().mantissa.abs() != 0.5, unit / 2)  # next to a power of two
    if decay.any():
        is_changed, is_lost = exact > 2 * unit + margin * size, size < below / 4
    else:
        is_changed = size > 0.5 * (1 + margin) * unit
        is_lost = size < 0.5 * (1 - margin) * below
    return w.numel() - int((is_changed | is_lost).sum())


def root_of_variance(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
    return (v / (1 - group["betas"][1] ** float(state["step"]))).sqrt()


@pytest.mark.parametrize("name", [*ADAMS][:-1])
def test_in_float32_the_formula_is_precise_for_weights_of_usual_size(backend, name):
    """Statistics are within 1e-6 of the rms if an update is not smaller than 1 % of the weight."""
    torch.manual_seed(0)
    p = nn.Parameter(0.02 * torch.randn(100, 200))
    optimizer = ADAMS[name]([p], eps=1e-8)
    watcher = watched({"p": p}, optimizer)
    for _ in range(2):
        p.grad = torch.randn_like(p)
        before = p.detach().clone().double()
        optimizer.step()
        entry = watcher.summary["p"]
        assert entry.optimizer.update_method == "formula"
        check_update(entry.update, p.detach().double() - before)
        assert entry.update.zero_count == 0


def check_products(
    entry: Any, p: Tensor, dw: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    """Compare cosines, the lag and the share of small variances with float64."""
    g = p.grad.double()

    def cosine(a: Tensor, b: Tensor) -> float:
        return (a.flatten() @ b.flatten() / a.norm() / b.norm()).item()

    got = entry.optimizer.cosine("update", "grad")
    assert got == pytest.approx(cosine(dw, g), abs=TOLERANCE, nan_ok=True)
    momentum = entry.optimizer.momentum
    assert (momentum is None) == state.keys().isdisjoint({"exp_avg", "momentum_buffer"})
    if momentum is not None:
        got = entry.optimizer.cosine(momentum, "grad")
        expected = cosine(state[momentum].double(), g)
        assert got == pytest.approx(expected, abs=TOLERANCE, nan_ok=True)
    if "exp_avg_sq" not in state:
        assert math.isnan(entry.optimizer.rms) and math.isnan(entry.optimizer.eps_fraction)
        return
    root = root_of_variance(state, group)
    lag = (g.square() / root.clamp(min=group["eps"]).square()).mean().sqrt().item()
    assert entry.optimizer.rms == pytest.approx(lag, rel=TOLERANCE)
    small = (root < group["eps"]).sum().item()
    near = ((root / group["eps"] - 1).abs() < 1e-6).sum().item()
    assert abs(entry.optimizer.eps_fraction * p.numel() - small) <= near + 1e-6
