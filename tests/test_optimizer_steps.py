"""`watch(optimizer=)` of unusual optimizers: with other hooks, nested steps, or exceptions."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import paramstats
from tests.test_optimizer import adam, check_update, doubled
from tests.test_optimizer_watch import backward, network, watch


def check_steps(model: nn.Module, optimizer: optim.Optimizer, **options) -> paramstats.Watcher:
    """Compare the updates of two steps with differences of the parameters."""
    watcher = watch(model, optimizer, **options)
    params = dict(model.named_parameters())
    for _ in range(2):
        backward(model)
        before = doubled(params)
        optimizer.step()
        for name, p in params.items():
            dw = p.detach().double() - before[name]
            check_update(watcher.summary[name].update, dw, 1e-7 + 1e-6 * dw.abs())
    return watcher


# ---- hyperparameters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"weight_decay": 100}, "copy"),
        ({"weight_decay": 99.99}, "copy"),
        ({"weight_decay": 40}, "formula"),
        ({"betas": (0.0, 0.9)}, "formula"),
        ({"betas": (0.9, 0.0)}, "formula"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": False}, "formula"),
        ({"weight_decay": torch.tensor(0.1), "foreach": False}, "formula"),
        ({"lr": 0.0}, "formula"),
    ],
    ids=str,
)
def test_updates_are_right_with_unusual_hyperparameters(backend, options, method):
    """With lr * weight decay = 1, the step forgets the parameter, which the formula needs."""
    model = network()
    watcher = check_steps(model, adam(**options)(model.parameters(), eps=1e-8))
    assert {entry.optimizer.update_method for entry in watcher.summary.values()} == {method}
    assert watcher.summary["0.bias"].optimizer.rms > 0


def test_epsilon_may_be_a_tensor(backend):
    model = network()
    check_steps(model, adam(foreach=False)(model.parameters(), eps=torch.tensor(0.1)))


def test_several_values_of_epsilon_have_its_name():
    model = network()
    optimizer = optim.Adafactor(model.parameters(), eps=(1e-20, 1e-3))
    entry = paramstats.summarize(model, optimizer=optimizer)["0.bias"]
    assert {"eps1", "eps2"} <= entry.optimizer.hyperparameters.keys()


# ---- other hooks ---------------------------------------------------------------------------------


def test_hooks_after_a_step_do_not_change_what_is_read(backend):
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def finish(optimizer: optim.Optimizer, *_: object) -> None:
        schedule.step()
        optimizer.zero_grad()

    optimizer.register_step_post_hook(finish)
    watcher = check_steps(model, optimizer)
    entry = watcher.summary["0.bias"]
    assert entry.optimizer.lr == 0.1 * 0.5 and entry.grad.norm > 0


def test_an_exception_in_a_step_does_not_keep_copies(monkeypatch):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watcher = watch(model, optimizer, every=2)
    backward(model)
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    assert watcher._hooks._requests[0].copies
    optimizer.step()
    assert watcher._hooks._requests == [None] and watcher.summary is None
    optimizer.step()
    assert watcher.summary["0.bias"].update.norm > 0


# ---- other optimizers ----------------------------------------------------------------------------


class ClearingSGD(optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)
        self.zero_grad()


class ShrinkingSGD(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mul_(0.9)
        super().step(closure)


class Lookahead(optim.Optimizer):
    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self._slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        for p, slow in zip(self.param_groups[0]["params"], self._slow, strict=True):
            p.copy_(slow.lerp_(p, 0.5))


def test_an_optimizer_that_clears_gradients_has_no_update_without_a_copy(backend):
    model = network()
    optimizer = ClearingSGD(model.parameters(), {"lr": 1.0})
    with check_steps(model, optimizer):
        pass
    watcher = watch(model, optimizer, update="formula")
    backward(model)
    optimizer.step()
    assert watcher.summary["0.bias"].update is None


def test_a_step_that_calls_that_of_its_base_class_is_one_step(backend):
    """Torch calls the hooks for both, once an optimizer of the base class was created."""
    optim.SGD(network().parameters())
    model, steps = network(), []
    optimizer = ShrinkingSGD(model.parameters(), lr=0.1)
    with check_steps(model, optimizer):
        pass
    watch(model, optimizer, lambda _, step: steps.append(step), every=2)
    for _ in range(4):
        optimizer.step()
    assert steps == [0, 2]


def test_the_update_of_an_optimizer_around_another_is_that_of_both(backend):
    model = network()
    check_steps(model, Lookahead(optim.SGD(model.parameters(), lr=0.1)))


def test_keys_of_the_state_may_have_the_names_of_other_kinds(backend):
    class Remembering(optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                names = ("param", "grad", "update", "buffer")
                self.state[p].update({name: torch.ones_like(p) for name in names})
                p.sub_(p.grad)

    model = network()
    watcher = check_steps(model, Remembering(model.parameters(), {"lr": 1.0}))
    scalars, entry = watcher.summary.scalars(), watcher.summary["0.bias"]
    assert scalars["param_mean/0.bias"] == entry.mean != 1
    assert scalars["update_mean/0.bias"] == entry.update.mean != 1
    assert scalars["buffer_mean/0.bias"] == 1 == entry.optimizer.state["grad"].mean


# ---- parameters ----------------------------------------------------------------------------------


def test_a_frozen_parameter_with_a_gradient_changes(backend):
    """Optimizers update every parameter that has a gradient."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model)
    model[0].weight.requires_grad_(False)
    watcher = watch(model, optimizer)
    before = model[0].weight.double()
    optimizer.step()
    check_update(watcher.summary["0.weight"].update, model[0].weight.double() - before)


def test_a_parameter_that_stays_lazy_is_not_copied(backend):
    model = nn.ModuleList([nn.LazyLinear(2), nn.LazyLinear(2)])
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watcher = watch(model, optimizer)
    assert watcher.copy_bytes == 0
    model[0](torch.ones(1, 3)).sum().backward()
    assert watcher.copy_bytes == 4 * (6 + 2)
    optimizer.step()
    assert watcher.summary["0.bias"].update.mean == pytest.approx(-0.1)
    assert watcher.summary["1.weight"].shape is None


@pytest.mark.parametrize("groups", ["none are selected", "none are left"])
def test_a_step_without_a_selected_parameter_of_the_optimizer_is_read(backend, groups):
    model = network()
    optimizer = optim.AdamW(model[0].parameters())
    watcher = watch(model, optimizer, include="^2" if groups == "none are selected" else None)
    if groups == "none are left":
        optimizer.param_groups.clear()
    backward(model)
    optimizer.step()
    entry = watcher.summary["2.bias"]
    assert entry.grad.norm > 0 and entry.update is None and entry.optimizer is None
