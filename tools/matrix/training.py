"""Rows about ways to train: accumulation, checkpointing, scaled losses, hooks."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.matrix.checker import Checker, Observe, same_training, unobserved
from tools.matrix.rows import NotRunError, row


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 hand-written digits of 64 pixels, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def batch(step: int, size: int = 64) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    begin = step * size % (len(images) - size)
    return images[begin : begin + size], labels[begin : begin + size]


def classifier(width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)
    )


def train(
    model: nn.Module,
    observe: Observe = unobserved,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 3,
) -> nn.Module:
    """A few steps on digits; `observe(model)` after each backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for step in range(steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        observe(model)
        optimizer.step()
    return model


@row("Training on digits with SGD", "sklearn", quick=True)
def plain(check: Checker) -> str:
    same_training(check, lambda observe: train(classifier(), observe))
    return "bitwise the same training with and without the calls"


@row("Gradient accumulation over four batches", "sklearn", quick=True)
def accumulation(check: Checker) -> None:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(8):
            images, labels = batch(step)
            (functional.cross_entropy(model(images), labels) / 4).backward()
            observe(model)
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        observe(model)
        return model

    same_training(check, run)


@row("Activation checkpointing, reentrant and not", "sklearn", quick=True)
def checkpointing(check: Checker) -> str:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
            self.head = nn.Linear(64, 10)
            self.reentrant = reentrant
            self.inside: Observe = unobserved

        def block(self, layer: nn.Module, x: Tensor) -> Tensor:
            self.inside(self)
            return torch.relu(layer(x))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            for layer in self.inner:
                x = checkpoint(self.block, layer, x, use_reentrant=self.reentrant)
            return self.head(x)

    for reentrant in (False, True):

        def run(observe: Observe, reentrant: bool = reentrant) -> nn.Module:
            model = Checkpointed(reentrant)
            model.inside = observe
            images, labels = batch(0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                functional.cross_entropy(model(images.clone()), labels).backward()
                observe(model)
                optimizer.step()
            return model

        same_training(check, run)
    return "also called inside recomputed blocks during backward"


@row("Autocast to bfloat16 and float16 with GradScaler", "sklearn", quick=True)
def autocast(check: Checker) -> str:
    for dtype in (torch.bfloat16, torch.float16):

        def run(observe: Observe, dtype: torch.dtype = dtype) -> nn.Module:
            model = classifier()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
            for step in range(3):
                images, labels = batch(step)
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=dtype):
                    loss = functional.cross_entropy(model(images), labels)
                    observe(model)
                scaler.scale(loss).backward()
                observe(model, grad_scale=scaler.get_scale())
                scaler.unscale_(optimizer)
                observe(model)
                scaler.step(optimizer)
                scaler.update()
            return model

        same_training(check, run)
    return "`grad_scale=` gives the statistics after `unscale_`; also called inside autocast"


@row("Optimizer inside backward (post-accumulate hooks)", "sklearn", quick=True)
def optimizer_in_backward(check: Checker) -> str:
    def run(observe: Observe) -> nn.Module:
        model = classifier()
        names = {p: name for name, p in model.named_parameters()}
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in names}

        def step(p: Tensor) -> None:
            observe({names[p]: p})
            optimizers[p].step()
            p.grad = None

        for p in names:
            p.register_post_accumulate_grad_hook(step)
        for at in range(3):
            images, labels = batch(at)
            functional.cross_entropy(model(images), labels).backward()
            observe(model)
        assert all(p.grad is None for p in names)
        return model

    same_training(check, run)
    return "each gradient in its hook; `.grad is None` after backward"


@row("Profiler, anomaly mode, deterministic mode, FLOP counter, default dtype", "sklearn",
     quick=True)  # fmt: skip
def modes(check: Checker) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = train(classifier())
    with torch.profiler.profile(), torch.autograd.detect_anomaly(check_nan=True):
        train(model, check, steps=1)
    with FlopCounterMode(display=False) as counter:
        check(model)
    assert counter.get_total_flops() == 0
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    try:
        check(model)
        with torch.device("meta"):
            check(model)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


@row("Gradients of another dtype than their parameters", quick=True)
def grad_dtype(check: Checker) -> str:
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise NotRunError("this torch has no grad_dtype")
    weight = nn.Parameter(torch.randn(300, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    for _ in range(2):
        (weight.float().square().sum() / 7).backward()
        check({"weight": weight})
    assert weight.grad.dtype == torch.float32
    return "bfloat16 weights with float32 gradients"


@row("Double backward: gradients that have a graph", "sklearn", quick=True)
def double_backward(check: Checker) -> None:
    def run(observe: Observe) -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        images, labels = batch(0)
        for _ in range(2):
            model.zero_grad()
            functional.cross_entropy(model(images), labels).backward(create_graph=True)
            observe(model)
            sum(p.grad.square().sum() for p in model.parameters()).backward()
            observe(model)
        model.zero_grad()
        return model

    same_training(check, run)


@row("Weight averaging: AveragedModel, update_bn", "sklearn", quick=True)
def ema(check: Checker) -> None:
    from torch.optim import swa_utils

    model = classifier()
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )

    def observe(trained: nn.Module) -> None:
        average.update_parameters(trained)
        check(trained)
        check(average)

    train(model, observe)
    swa_utils.update_bn([batch(0)[0], batch(1)[0]], average)
    assert check(average)["module.0.weight"].grad is None
    check(copy.deepcopy(model))


@row("accelerate: Accelerator.prepare, accumulate and backward", "sklearn", "accelerate")
def accelerate(check: Checker) -> None:
    from accelerate import Accelerator

    def run(observe: Observe) -> nn.Module:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = classifier()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(4):
            with accelerator.accumulate(model):
                images, labels = batch(step)
                accelerator.backward(functional.cross_entropy(model(images), labels))
                observe(model)
                optimizer.step()
                optimizer.zero_grad()
        return model

    same_training(check, run)
