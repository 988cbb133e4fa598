"""What makes the trainings of the clinic sick: changes of models, losses and data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.clinic.attention import Experts, Transformer
from tests.clinic.data import digits
from tests.clinic.models import Layer, autoencoder, cnn, mlp
from tests.clinic.training import Observe, Training

# ---- changes of a model, before the training or at a step


@torch.no_grad()
def std(model: nn.Module, value: float, except_for: str = "$^") -> None:
    """Initialize all weights with this standard deviation, except for some."""
    for name, p in model.named_parameters():
        if p.ndim > 1 and not re.search(except_for, name):
            nn.init.normal_(p, 0, value)


def change(name: str, edit: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    """Return a function that edits one parameter of a model in place."""

    @torch.no_grad()
    def apply(model: nn.Module) -> None:
        edit(model.get_parameter(name))

    return apply


def at(onset: int, edit: Callable[[nn.Module], Any]) -> Callable[[nn.Module, int], None]:
    """Return an action that edits the model at one step."""
    return lambda model, step: edit(model) if step == onset else None


@torch.no_grad()
def kill(model: nn.Module, layer: str, units: int | None = None, bias: float = -100) -> None:
    """Make units behind a ReLU dead, with weights of zero; None: all."""
    module = model.get_submodule(layer)
    module.weight[:units] = 0
    module.bias[:units] = bias


@torch.no_grad()
def zero_both_sides(model: nn.Module, first: str, second: str) -> None:
    """Set two layers that follow one another to zero: neither can start to learn."""
    for name in (first, second):
        for p in model.get_submodule(name).parameters():
            p.zero_()


@torch.no_grad()
def equal_rows(model: nn.Module, *names: str) -> None:
    for name in names:
        w = model.get_parameter(name)
        w[:] = w[:1].clone()


def equal_layer(model: nn.Module, first: str, second: str) -> None:
    """Make the units of a layer equal, and the weights from them, so that they stay equal."""
    equal_rows(model, f"{first}.weight")
    with torch.no_grad():
        model.get_submodule(first).bias.zero_()
        w = model.get_submodule(second).weight
        w[:] = w[:, :1].clone()


def clamp(pattern: str, limit: float, begin: int = 0) -> Callable[[nn.Module, int], None]:
    """Return an action that clamps weights after each step."""

    def after(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if step >= begin and re.search(pattern, name):
                    p.clamp_(-limit, limit)

    return after


def uninitialized(name: str) -> Callable[[nn.Module], None]:
    """Leave a weight as `torch.empty` may return it: with NaN in some places."""

    def edit(w: Tensor) -> None:
        w.view(-1)[:: w.numel() // 7] = math.nan

    return change(name, edit)


def spike(onset: int, factor: float = 1000.0) -> Callable[[Tensor, int], Tensor]:
    return lambda loss, step: loss * factor if step == onset else loss


# ---- models with a disease


def detached(model: nn.Module) -> nn.Module:
    return Layer(
        lambda self, x: self.head(self.encoder(x).detach()),
        encoder=model,
        head=nn.Linear(10, 10),
    )


class DetachedTransformer(Transformer):
    """A language model whose last block reads detached states."""

    def forward(self, t: Tensor) -> Tensor:
        x = self.embed(t) + self.position[:, : t.shape[1]]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.norm(self.blocks[-1](x.detach())))


def with_layer(model: nn.Sequential, i: int, call: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    model[i] = Layer(call)
    return model


def log_of_zero(self: Any, x: Tensor) -> Tensor:
    """log(0) = -inf in the forward pass, where the input is zero or less."""
    return torch.log(x.clamp(min=0))


def root_of_zero(self: Any, x: Tensor) -> Tensor:
    """sqrt(0): the value is right, but the slope is infinite."""
    return torch.sqrt(x * (x > 0))


def log_in_middle() -> nn.Module:
    model = autoencoder()
    return with_layer(model, 3, log_of_zero)


def dead_experts(model: nn.Module) -> None:
    """Experts 2 and 3 of each block never get a token."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.bias[2:] = -10


def dead_router(model: nn.Module) -> None:
    """Experts 1 to 3 of the first block never get a token."""
    model.blocks[0].feed.bias[1:] = -10


def half_loss(model: nn.Module, scale: float) -> Callable[[int], Tensor]:
    """Return the loss of a float16 model, times a factor."""
    x, labels = digits()

    def loss(step: int) -> Tensor:
        rows = torch.randint(0, len(x), (64,))
        return F.cross_entropy(model(x[rows].half()).float(), labels[rows]) * scale

    return loss


def cast(dtype: torch.dtype, build: Callable[[], nn.Module]) -> nn.Module:
    return build().to(dtype)


def gan_collapse() -> Training:
    """The generator's layer is missing in its optimizer."""
    model = nn.ModuleDict({"g": mlp(3, 64, inputs=16, outputs=64), "d": mlp(3, 64, outputs=1)})
    g, d = model["g"], model["d"]
    learned = [p for n, p in g.named_parameters() if not n.startswith("2.")]
    optimizers = [torch.optim.Adam(p, lr=1e-3) for p in (learned, d.parameters())]

    def loop(observe: Observe) -> None:
        x, _ = digits()
        for _ in range(80):
            fake = g(torch.randn(64, 16))
            model.zero_grad()
            F.softplus(-d(fake)).mean().backward(retain_graph=True)
            d.zero_grad()
            real = x[torch.randint(0, len(x), (64,))]
            loss = F.softplus(d(fake.detach())).mean() + F.softplus(-d(real)).mean()
            loss.backward()
            observe(loss.item())
            for o in optimizers:
                o.step()

    return Training(model, optimizers, loop)


def scaled_branch(gain: float) -> nn.Module:
    """A branch without normalization, whose weights are too large."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    for layer in (first, second):
        nn.init.normal_(layer.weight, 0, gain / 8)
    return nn.Sequential(first, nn.ReLU(), second)


def gain_cnn(gain: float) -> nn.Module:
    model = cnn(12, 8, norm=None)
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, gain * math.sqrt(2 / module.weight[0].numel()))
    return model


def cnn_plain() -> nn.Module:
    return cnn(norm=None)


def relu_feed(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


def jump(onset: int, factor: float) -> Callable[[Any], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor if step >= onset else 1.0
    )


def bad_batch(model: nn.Module, onset: int) -> Callable[[int], Tensor]:
    """Pixels between 0 and 4,000 in one batch."""
    x, labels = digits()

    def loss(step: int) -> Tensor:
        rows = torch.randint(0, len(x), (64,))
        batch = x[rows] * (4000 if step == onset else 1)
        return F.cross_entropy(model(batch), labels[rows])

    return loss


def noisy(onset: int) -> Callable[[nn.Module, int], None]:
    """Return an action that multiplies the output of the last layer at one step."""

    def before(model: nn.Module, step: int) -> None:
        if step == onset:
            handle = model.head.register_forward_hook(lambda m, i, out: out * 300)
        elif step == onset + 1:
            handle = model.handle
            handle.remove()
        else:
            return
        model.handle = handle

    return before
