"""watch: statistics of the right moment, at the right steps, to whom they are for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramstats
from tests.integrations.arriving import have_figures_arrive_late
from tests.integrations.moments import Logged, loss, moment, network, scalars_of


@pytest.fixture
def arriving(monkeypatch):
    return have_figures_arrive_late(monkeypatch)


def test_a_plain_loop(backend):
    model, logged, moments = network(), Logged(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = paramstats.watch(model, every=3, log=logged)
    assert watcher.summary is None
    for step in range(8):
        optimizer.zero_grad()
        loss(model, step).backward()
        if step % 3 == 0:
            moments[step] = moment(model)
        watcher.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert list(moments) == [0, 3, 6]
    logged.check(moments)
    assert watcher.summary.scalars() == logged[6]


@pytest.mark.parametrize("by_number", [True, False])
def test_scaled_accumulated_and_clipped(backend, by_number):
    model, logged, moments = network(), Logged(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    watcher = paramstats.watch(model, logged, every=2)
    scales = set()
    for step in range(6):
        for part in range(2):
            scaler.scale(loss(model, 2 * step + part) / 2).backward()
        scales.add(scaler.get_scale())
        if step % 2 == 0:
            moments[step] = moment(model, scaler.get_scale())
        watcher.step(grad_scale=scaler.get_scale() if by_number else scaler)
        scaler.unscale_(optimizer)
        if step in moments:  # torch's own unscaling comes to the same
            for name, p in model.named_parameters():
                assert torch.equal(p.grad, moments[step][name].grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(scales) > 1, "the scale changed on the way"
    logged.check(moments)


def test_the_scaler_is_asked_on_due_steps_only(model):
    asked = []

    class Scaler:
        def get_scale(self) -> float:
            asked.append(1)
            return 2.0

    watcher = paramstats.watch(model, Logged(), every=4)
    for _ in range(8):
        watcher.step(grad_scale=Scaler())
    assert len(asked) == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_that_has_unscaled(enabled):
    model, logged = network(), Logged()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    watcher = paramstats.watch(model, logged, every=1)
    scaler.scale(loss(model, 0)).backward()
    scaler.unscale_(optimizer)
    if not enabled:
        watcher.step(grad_scale=scaler)
        assert logged[0] == scalars_of(moment(model))
        return
    for after in (lambda: scaler.step(optimizer), scaler.update):
        with pytest.raises(ValueError, match=r"^paramstats: expected .* before scaler\.uns"):
            watcher.step(grad_scale=scaler)
        after()
    optimizer.zero_grad()
    scaler.scale(loss(model, 0)).backward()
    now = moment(model, 1024.0)
    watcher.step(grad_scale=scaler)
    logged.check({2: now})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant):
    model, logged = network(), Logged()
    x = torch.randn(4, 64, requires_grad=True)
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    now = moment(model)
    paramstats.watch(model, logged).step()
    logged.check({0: now})


def test_steps_of_ones_own(model):
    logged = Logged()
    watcher = paramstats.watch(model, logged, every=10)
    for step in (17, 18, 19, 20, 29, 31, 39, 40):  # resumed at 17; 30 was not among them
        watcher.step(step=step)
    assert list(logged) == [17, 20, 31, 40]
    watcher.step()
    watcher.step(step=50)
    assert list(logged) == [17, 20, 31, 40, 50]


def test_steps_that_start_again(model):
    steps = []
    watcher = paramstats.watch(model, lambda _, step: steps.append(step), every=4)
    for _ in range(2):
        for step in range(6):
            watcher.step(step=step)
    assert steps == [0, 4, 0, 4]


def test_what_is_on_its_way_is_logged_one_call_later(model, arriving):
    logged, expected = Logged(), paramstats.summarize(model).scalars()
    watcher = paramstats.watch(model, logged, every=3)
    watcher.step()
    assert not logged and not arriving[-1].is_read, "nothing waits"
    assert watcher.summary is not None and not arriving[-1].is_read
    watcher.step()
    assert logged == {0: expected} and arriving[-1].is_read
    watcher.step()
    watcher.step()
    watcher.close()
    assert logged == {0: expected, 3: expected}
    watcher.close()
    assert list(logged) == [0, 3]


def test_what_is_on_its_way_at_every_step(model, arriving):
    logged = Logged()
    with paramstats.watch(model, logged, every=1) as watcher:
        for step in range(4):
            watcher.step()
            assert list(logged) == list(range(step))
    assert list(logged) == [0, 1, 2, 3]


def test_after_an_error_nothing_waits(model, arriving):
    logged = Logged()
    for is_here in (False, True):
        with (  # noqa: PT012
            pytest.raises(RuntimeError, match="diverged"),
            paramstats.watch(model, logged) as watcher,
        ):
            watcher.step()
            arriving[-1].is_here = is_here
            raise RuntimeError("diverged")
        assert list(logged) == ([0] if is_here else [])


def test_a_log_that_fails(model):
    told = []

    def log(scalars: dict[str, float], step: int) -> None:
        told.append(step)
        if step == 2:
            raise ConnectionError("no network")

    watcher = paramstats.watch(model, log, every=2)
    watcher.step()
    watcher.step()
    with pytest.raises(ConnectionError):
        watcher.step()
    watcher.step()
    watcher.step()
    watcher.close()
    assert told == [0, 2, 4]


def test_a_late_log_that_fails(model, arriving):
    told = []

    def log(scalars: dict[str, float], step: int) -> None:
        told.append(step)
        raise ConnectionError("no network")

    watcher = paramstats.watch(model, log, every=1)
    watcher.step()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            watcher.step()
    with pytest.raises(ConnectionError):
        watcher.close()
    watcher.close()
    assert told == [0, 1, 2]


def test_history(model):
    kept = []

    class History:
        def append(self, step, summary):
            kept.append((step, summary))

    watcher = paramstats.watch(model, every=2, history=History())
    for _ in range(3):
        watcher.step()
    assert [step for step, _ in kept] == [0, 2] and kept[-1][1] is watcher.summary


def test_a_history_does_not_wait(model, arriving):
    kept = {}

    class History:
        append = staticmethod(kept.__setitem__)

    watcher = paramstats.watch(model, Logged(), history=History())
    watcher.step()
    assert list(kept) == [0] and not arriving[-1].is_read


def test_what_is_read_and_what_is_logged(model):
    logged = Logged()
    patterns = (pattern for pattern in ("weight", "2"))  # goes through them once
    key = "l2_norm/{kind}/{name}"
    watcher = paramstats.watch(
        model, logged, every=1, key=key, stats=("norm",), totals=False, include=patterns,
        exclude=re.compile("0"), params=False, correction=0,
    )  # fmt: skip
    watcher.step()
    watcher.step()
    assert logged[0].keys() == logged[1].keys() == {"l2_norm/grad/2.weight", "l2_norm/grad/2.bias"}
    expected = paramstats.summarize(model, correction=0)["2.bias"].grad
    assert watcher.summary["2.bias"].grad == expected


def test_buffers_and_mappings():
    model, logged = nn.BatchNorm1d(3), Logged()
    paramstats.watch(model, logged, buffers=True).step()
    assert "buffer_mean/running_var" in logged[0]
    logged = Logged()
    paramstats.watch(model.state_dict(), logged, grads=False).step()
    assert logged[0]["param_mean/running_var"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": [1]}, TypeError, "expected a module or a mapping .*got list"),
        ({"log": None}, ValueError, "expected log= or history=, got neither"),
        ({"log": "wandb"}, TypeError, "expected a function of scalars and step .*'wandb'"),
        ({"every": 0}, ValueError, "whole number > 0 for every, got 0"),
        ({"every": 2.0}, ValueError, "whole number > 0 for every, got 2.0"),
        ({"every": True}, ValueError, "whole number > 0 for every, got True"),
        ({"stats": ("median",)}, ValueError, "got 'median'"),
        ({"key": "{layer}"}, ValueError, "got 'layer'"),
        ({"include": "("}, re.error, "for include"),
        ({"exclude": 3}, TypeError, "for exclude"),
        ({"correction": float("nan")}, ValueError, "finite number for correction"),
    ],
)
def test_arguments_are_refused_before_training(model, arguments, error, message):
    with pytest.raises(error, match=rf"^paramstats\.\w+: .*{message}"):
        paramstats.watch(**{"source": model, "log": print, **arguments})


def test_import_brings_nothing_optional():
    code = "import torch, sys; before = set(sys.modules); import paramstats; " + (
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(out.stdout.split()) - set(sys.stdlib_module_names)
    assert new == {"paramstats"}


def test_a_scaler_that_serves_two_optimizers():
    """The usual loop of two networks: one has stepped when the other's gradients are scaled."""
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (two, one)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    logged = []
    watcher = paramstats.watch(one, lambda scalars, step: logged.append(scalars), stats="norm")
    scaler.scale(two(one(torch.ones(4, 3)).detach()).mean()).backward()
    scaler.step(optimizers[0])
    scaler.scale(two(one(torch.ones(4, 3))).mean()).backward()
    with pytest.raises(ValueError, match="several optimizers, name the one"):
        watcher.step(grad_scale=scaler)
    watcher.step(grad_scale=scaler, optimizer=optimizers[1], step=0)
    assert logged[0]["grad_norm/weight"] == pytest.approx(one.weight.grad.norm().item() / 1024)
    scaler.unscale_(optimizers[1])
    with pytest.raises(ValueError, match=r"before scaler\.unscale_"):
        watcher.step(grad_scale=scaler, optimizer=optimizers[1], step=50)


def test_a_key_without_a_kind_is_refused_before_training():
    with pytest.raises(ValueError, match="expected a key for each statistic"):
        paramstats.watch(nn.Linear(3, 2), print, key="{stat}/{name}")
    with pytest.raises(TypeError, match="expected a History or a path for history, got 3"):
        paramstats.watch(nn.Linear(3, 2), history=3)
