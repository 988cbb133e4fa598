"""`watch(optimizer=)`: each due step of an optimizer is read, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn, optim

import paramstats
from tests.integrations.training import Logged
from tests.test_optimizer import adam, check_update

STATS = ("norm", "mean", "zero_fraction")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module, factor: float = 1.0) -> torch.Tensor:
    model.zero_grad()
    loss = factor * model(torch.randn(6, 4)).square().mean()
    loss.backward()
    return loss


class Steps:
    """Records the truth of each step of an optimizer with hooks of its own."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        self._names = {p: name for name, p in model.named_parameters()}
        self._before: dict[str, torch.Tensor] = {}
        self.updates: list[dict[str, torch.Tensor]] = []
        self.grads: list[dict[str, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._pre)
        optimizer.register_step_post_hook(self._post)

    def _params(self, optimizer: optim.Optimizer) -> dict[str, nn.Parameter]:
        params = (p for group in optimizer.param_groups for p in group["params"])
        return {self._names[p]: p for p in params if p in self._names}

    def _pre(self, optimizer: optim.Optimizer, *_: object) -> None:
        params = self._params(optimizer)
        self._before = {name: p.detach().clone().double() for name, p in params.items()}

    def _post(self, optimizer: optim.Optimizer, *_: object) -> None:
        params = self._params(optimizer)
        self.updates.append(
            {name: p.detach().double() - self._before[name] for name, p in params.items()}
        )
        self.grads.append(
            {name: p.grad.clone().double() for name, p in params.items() if p.grad is not None}
        )

    def check(
        self, summary: paramstats.Summary, step: int = -1, *, precision: float = 1e-6
    ) -> None:
        """Compare the entries of this optimizer's parameters with one of its steps.

        Args:
            summary: the summary of the step.
            step: the index of the step.
            precision: the relative error of the optimizer's arithmetic; in addition, it rounds
                weights below 1.
        """
        for name, dw in self.updates[step].items():
            check_update(summary[name].update, dw, 1e-7 + precision * dw.abs())
            grad = self.grads[step].get(name)
            assert (summary[name].grad is None) == (grad is None)
            if grad is not None:
                assert summary[name].grad.norm == pytest.approx(grad.norm().item(), rel=1e-6)


def ignore(*_: object) -> None:
    """A log function."""


def watch(model: nn.Module, optimizer: object, log=ignore, **options) -> paramstats.Watcher:
    options = {"every": 1, "stats": STATS, **options}
    return paramstats.watch(model, log, optimizer=optimizer, **options)


# ---- one optimizer -------------------------------------------------------------------------------


def test_due_steps_are_logged_with_clipped_gradients(backend):
    model, logged = network(), Logged()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    truth, watcher = Steps(model, optimizer), watch(model, optimizer, logged, every=3)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(7):
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        schedule.step()
        if step % 3 == 0:
            truth.check(watcher.summary)
            assert watcher.summary["0.bias"].optimizer.lr == 0.1 * 0.5**step
            assert watcher.summary["0.bias"].optimizer.step == step + 1
            assert watcher.summary.scalars(stats=STATS) == logged[step]
    assert list(logged) == [0, 3, 6]
    with pytest.raises(RuntimeError, match=r"remove this call"):
        watcher.step()


def test_a_closure_is_called_as_without_a_watcher(backend):
    """LBFGS calls it several times, so that the gradient is that of the last call."""
    results = []
    for is_watched in (False, True):
        model = network()
        x = torch.randn(6, 4)
        optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if is_watched:
            truth, watcher = Steps(model, optimizer), watch(model, optimizer)
        for _ in range(2):
            loss = optimizer.step(closure)
            if is_watched:
                truth.check(watcher.summary)
                assert watcher.summary["0.weight"].optimizer.update_method == "copy"
        results.append((loss.item(), [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.parametrize("update", ["auto", "formula"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "AdamW(fused)"])
def test_steps_that_a_gradient_scaler_skips_do_not_count(backend, kind, update):
    """Fused optimizers skip a step themselves, after their hooks; the next one is due instead."""
    model = network()
    make = {"SGD": optim.SGD, "AdamW": optim.AdamW, "AdamW(fused)": adam(fused=True)}[kind]
    optimizer = make(model.parameters(), **({"eps": 1e-8} if "fused" in kind else {"lr": 0.1}))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    truth, logged = Steps(model, optimizer), Logged()
    watcher = watch(model, optimizer, logged, update=update)
    for step in range(4):
        optimizer.zero_grad()
        factor = float("inf") if step == 1 else 1.0
        scaler.scale(factor * model(torch.randn(6, 4)).square().mean()).backward()
        before = watcher.summary
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert watcher.summary is before
        elif (kind, update) == ("SGD", "formula"):
            assert watcher.summary["0.weight"].update is None
        else:
            truth.check(watcher.summary)
    assert len(logged) == 3


@pytest.mark.parametrize("update", ["auto", "copy", "formula", None])
@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD])
def test_the_method_of_the_update_can_be_chosen(backend, kind, update):
    model = network().to(torch.bfloat16)
    model[0].float()
    optimizer = kind(model.parameters(), lr=0.1)
    watcher = watch(model, optimizer, update=update)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = {
        ("auto", True): ("formula", "copy"),
        ("formula", True): ("formula", "formula"),
        ("auto", False): ("copy", "copy"),
        ("copy", True): ("copy", "copy"),
        ("copy", False): ("copy", "copy"),
    }.get((update, kind is optim.AdamW), (None, None))
    nbytes = [sum(p.numel() * p.element_size() for p in model[i].parameters()) for i in (0, 2)]
    copied = [n for n, method in zip(nbytes, expected, strict=True) if method == "copy"]
    assert watcher.copy_bytes == sum(copied)
    optimizer.step()
    entries = watcher.summary["0.weight"], watcher.summary["2.weight"]
    assert tuple(entry.optimizer.update_method for entry in entries) == expected
    assert [entry.update is None for entry in entries] == [method is None for method in expected]


def test_too_little_memory_for_copies_warns_once_and_training_continues(backend, monkeypatch):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watcher = watch(model, optimizer)

    clone = torch.Tensor.clone

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        if "paramstats" in sys._getframe(1).f_globals["__name__"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return clone(tensor)

    backward(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", fail)
        with pytest.warns(RuntimeWarning, match=r"268 bytes .*include=.*OutOfMemoryError"):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    backward(model)
    optimizer.step()
    entry = watcher.summary["0.weight"]
    assert entry.update is None and entry.optimizer.update_method is None
    assert entry.optimizer.state["momentum_buffer"].count == 32
    assert -1 <= entry.optimizer.cosine("grad", "momentum_buffer") <= 1


def test_close_removes_the_hooks_and_the_optimizer_is_not_kept_alive():
    model = network()
    optimizer = optim.AdamW(model.parameters())
    with watch(model, optimizer) as watcher:
        backward(model)
        optimizer.step()
    first = watcher.summary
    optimizer.step()
    assert watcher.summary is first
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    alive = weakref.ref(optimizer)
    del optimizer, watcher
    gc.collect()
    assert alive() is None


def test_copies_and_state_dicts_of_a_watched_optimizer_are_not_watched():
    model = network()
    optimizer = optim.AdamW(model.parameters())
    watcher = watch(model, optimizer)
    backward(model)
    optimizer.step()
    first = watcher.summary
    pickle.dumps(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.step()
        assert watcher.summary is first
    optimizer.load_state_dict(optimizer.state_dict())
    truth = Steps(model, optimizer)
    optimizer.step()
    truth.check(watcher.summary)


def test_a_compiled_step_is_read(backend):
    """Torch then computes 1 - beta2^step in float32, where 1 - 0.999 has an error of 6e-5."""
    torch._dynamo.reset()
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    truth, logged = Steps(model, optimizer), Logged()
    watcher = watch(model, optimizer, logged)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(3):
        backward(model)
        step()
        truth.check(watcher.summary, precision=6e-5)
        assert watcher.summary["0.bias"].optimizer.step == number + 1
    assert list(logged) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "weight"}, {"0.weight", "2.weight"}),
        ({"exclude": "^0"}, {"2.weight", "2.bias"}),
        ({"params": False}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ({"grads": False}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ({"buffers": True}, {"0.weight", "0.bias", "2.weight", "2.bias", "1.mean"}),
    ],
)
@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD])
def test_arguments_of_summarize_apply(backend, kind, options, names):
    model = network()
    model[1].register_buffer("mean", torch.ones(2))
    optimizer = kind(model.parameters(), lr=0.1)
    truth, logged = Steps(model, optimizer), Logged()
    watcher = watch(model, optimizer, logged, **options)
    backward(model)
    optimizer.step()
    summary = watcher.summary
    assert set(summary) == names
    for name in names - {"1.mean"}:
        entry = summary[name]
        check_update(entry.update, truth.updates[0][name], 1e-6)
        assert (entry.grad is None) == ("grads" in options)
        assert (entry.update_ratio != entry.update_ratio) == ("params" in options)
        assert f"update_norm/{name}" in logged[0]
        assert entry.optimizer.lr == 0.1
    if "buffers" in options:
        assert summary["1.mean"].update is None and summary["1.mean"].optimizer is None


# ---- several optimizers --------------------------------------------------------------------------


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(1))  # no optimizer has it

    def loss(self, of_discriminator: bool) -> torch.Tensor:
        fake = self.generator(torch.randn(5, 2)) * self.scale
        if of_discriminator:
            real = self.discriminator(torch.randn(5, 3))
            return (self.discriminator(fake.detach()) - real).sigmoid().mean()
        return -self.discriminator(fake).sigmoid().mean()


@pytest.mark.parametrize("discriminator_steps", [1, 5])
@pytest.mark.parametrize("every", [1, 3])
def test_the_optimizers_of_a_gan_are_read_each_at_its_own_step(backend, every, discriminator_steps):
    """The generator's loss leaves gradients in the discriminator, which nothing must log."""
    model = Gan()
    optimizers = {
        "discriminator": optim.Adam(model.discriminator.parameters(), lr=0.05),
        "generator": optim.SGD(model.generator.parameters(), lr=0.05),
    }
    truth = {name: Steps(model, optimizer) for name, optimizer in optimizers.items()}
    step_of: list[tuple[str, int]] = []  # the optimizer and the index of its step, in order
    logged, expected = Logged(), {}
    watcher = watch(model, list(optimizers.values()), logged, every=every)
    for _ in range(7):
        for name in ["discriminator"] * discriminator_steps + ["generator"]:
            optimizers[name].zero_grad()
            model.loss(name == "discriminator").backward()
            optimizers[name].step()
            step_of.append((name, len(truth[name].updates) - 1))
    watcher.close()
    # A round has at most one step of each optimizer; each is due once per `every` rounds.
    number, stepped, due = -1, set(optimizers), dict.fromkeys(optimizers, 0)
    for name, index in step_of:
        if name in stepped:
            number, stepped = number + 1, set()
        stepped.add(name)
        if number >= due[name]:
            due[name] = number - number % every + every
            expected.setdefault(number, {})[name] = index
    assert logged.keys() == expected.keys()
    for number, steps in expected.items():
        names = {key.split("/")[1] for key in logged[number] if key.startswith("update_norm/")}
        assert {name.split(".")[0] for name in names} - {"total"} == set(steps)
        for name, index in steps.items():
            for param, dw in truth[name].updates[index].items():
                norm = logged[number][f"update_norm/{param}"]
                assert norm == pytest.approx(dw.norm().item(), rel=1e-5)
                grad = truth[name].grads[index][param]
                norm = logged[number][f"grad_norm/{param}"]
                assert norm == pytest.approx(grad.norm().item(), rel=1e-6)
        assert ("param_norm/scale" in logged[number]) == ("discriminator" in steps)
        assert "update_norm/scale" not in logged[number]


def test_one_optimizer_per_parameter_in_backward_gives_one_summary(backend):
    model, logged = network(), Logged()
    optimizers = {p: optim.AdamW([p], lr=0.1) for p in model.parameters()}
    truth = [Steps(model, optimizer) for optimizer in optimizers.values()]

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    watcher = watch(model, optimizers.values(), logged, every=2)
    for number in range(5):
        model(torch.randn(6, 4)).square().mean().backward()
        if number % 2 == 0:
            assert list(watcher.summary) == [name for name, _ in model.named_parameters()]
            for steps in truth:
                steps.check(watcher.summary)
    assert list(logged) == [0, 2, 4]


def test_a_model_without_any_parameter_of_the_optimizer_is_refused():
    optimizer = optim.AdamW(network().parameters())
    for call in (paramstats.summarize, paramstats.watch):
        with pytest.raises(ValueError, match=f"^paramstats.{call.__name__}: .* none of them"):
            call(
                network(),
                optimizer=optimizer,
                **({} if "s" in call.__name__[0] else {"log": ignore}),
            )
        with pytest.raises(TypeError, match=f"^paramstats.{call.__name__}: .*torch.optim.Optim"):
            call(network(), optimizer=[1], **({} if "s" in call.__name__[0] else {"log": ignore}))


def test_arguments_that_would_have_no_effect_are_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="expected an optimizer for update='copy', got none"):
        paramstats.watch(model, print, update="copy")


def test_the_repr_shows_learning_rate_step_and_state():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    entry = paramstats.summarize(model, optimizer=optimizer)["bias"]
    assert repr(entry.optimizer) == "<OptimizerStats lr=0.01 step=1 state: exp_avg, exp_avg_sq>"
