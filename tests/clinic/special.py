"""Healthy trainings that need a loop, a loss or a model of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.clinic.attention import Transformer
from tests.clinic.data import batch, digits, tokens
from tests.clinic.models import (
    Layer,
    gpt2,
    mlp,
    transformers,
    unet,
)
from tests.clinic.training import Training, adamw, fit, optimizer

nadam = optimizer("NAdam", 3e-3)
adagrad = optimizer("Adagrad", 1e-2)


def pooled(model: nn.Module) -> Any:
    """Predict tokens from the last hidden states, so that the model's pooler is not used."""
    model.head = nn.Linear(32, 32)

    def loss(step: int) -> Tensor:
        t = tokens(16, 16, 32)
        out = model.head(model(t[:, :-1]).last_hidden_state)
        return F.cross_entropy(out.flatten(0, 1), t[:, 1:].flatten())

    return loss


def t5() -> nn.Module:
    model = transformers(
        "T5", "T5ForConditionalGeneration", vocab_size=32, d_model=32, d_kv=16, d_ff=64,
        num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return Layer(lambda self, x: self.t5(input_ids=x[0], decoder_input_ids=x[1]).logits, t5=model)


def encoder_decoder() -> nn.Module:
    def call(self: Any, x: tuple[Tensor, Tensor]) -> Tensor:
        source, target = (self.embed(t) + self.position[:, : t.shape[1]] for t in x)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))

    core = nn.Transformer(32, 2, 2, 2, 64, dropout=0.0, batch_first=True)
    position = nn.Parameter(0.02 * torch.randn(1, 32, 32))
    members = {"embed": nn.Embedding(32, 32), "position": position}
    return Layer(call, **members, transformer=core, head=nn.Linear(32, 32))


def copy_task(model: nn.Module) -> Any:
    """Return the loss of repeating a sequence."""

    def loss(step: int) -> Tensor:
        t = tokens(16, 12, 31) + 1
        shifted = F.pad(t, (1, 0))[:, :-1]
        return F.cross_entropy(model((t, shifted)).flatten(0, 1), t.flatten())

    return loss


def rare(model: nn.Module) -> Any:
    """Return the loss of sequences in which most of 256 tokens never or rarely occur."""

    def loss(step: int) -> Tensor:
        t = tokens(4, 16, 32)
        t = torch.where(torch.rand(t.shape) < 0.01, t + 64, t)
        return F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())

    return loss


def word2vec() -> nn.Module:
    return Layer(
        lambda self, t: self.center(t) @ self.context.weight.T,
        center=nn.Embedding(128, 16),
        context=nn.Embedding(128, 16),
    )


def pairs(model: nn.Module) -> Any:
    def loss(step: int) -> Tensor:
        t = tokens(64, 2, 128)
        return F.cross_entropy(model(t[:, 0]), t[:, 1])

    return loss


def frozen_embedding() -> nn.Module:
    model = Transformer()
    model.embed.requires_grad_(False)
    return model


def checkpointed() -> nn.Module:
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def dropout() -> nn.Module:
    return mlp(4, 96, act=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.3)))


def siren() -> nn.Module:
    """Return a network with sines as activations."""
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
    for layer in layers:
        bound = math.sqrt(6 / 64) / 2
        nn.init.uniform_(layer.weight, -bound, bound)
    sine = [Layer(lambda self, x: torch.sin(2 * x)) for _ in layers]
    pairs = [module for pair in zip(layers, sine, strict=True) for module in pair]
    return nn.Sequential(*pairs, nn.Linear(64, 1))


def vae() -> Training:
    model = nn.ModuleDict({"encoder": mlp(3, 64, outputs=16), "decoder": mlp(3, 64, inputs=8)})
    model["decoder"][-1] = nn.Linear(64, 64)

    def loss(step: int) -> Tensor:
        x, _ = batch()
        mean, log_var = model["encoder"](x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
        return ((model["decoder"](z) - x) ** 2).sum(1).mean() + 0.1 * divergence

    return fit(model, loss, adamw(3e-3), 100)


def diffusion() -> Training:
    model = nn.ModuleDict({"time": nn.Linear(1, 64), "net": unet()})

    def loss(step: int) -> Tensor:
        x, _ = batch(32)
        t = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        noisy = t.cos() * (2 * x - 1) + t.sin() * noise
        return F.mse_loss(model["net"](noisy + model["time"](t)), noise)

    return fit(model, loss, adamw(3e-3), 80)


def siamese() -> Training:
    model = mlp(3, 64, outputs=16)

    def loss(step: int) -> Tensor:
        (a, la), (b, lb) = batch(), batch()
        distance = (model(a) - model(b)).norm(dim=1)
        same = (la == lb).float()
        return (same * distance**2 + 0.1 * (1 - same) * F.relu(1 - distance) ** 2).mean()

    return fit(model, loss, adamw(1e-3), 80)


def simclr() -> Training:
    model = mlp(4, 64, norm=nn.BatchNorm1d, outputs=16)

    def loss(step: int) -> Tensor:
        x, _ = batch()
        a, b = (F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))

    return fit(model, loss, adamw(3e-3), 60)


def graph(attention: bool = False) -> Training:
    """Classify the nodes of a graph of digits, whose edges are nearest neighbors."""
    x, labels = (part[:400] for part in digits())
    near = torch.cdist(x, x).topk(6, largest=False).indices
    adjacency = torch.zeros(400, 400).scatter_(1, near, 1)

    def mix(self: Any, h: Tensor) -> Tensor:
        weights = adjacency
        if attention:
            score = F.leaky_relu(self.left(h) + self.right(h).T)
            weights = score.masked_fill(adjacency == 0, -1e9).softmax(1)
        else:
            weights = adjacency / adjacency.sum(1, keepdim=True)
        return self.linear(weights @ h)

    def layer(n: int, out: int) -> nn.Module:
        ends = {"left": nn.Linear(n, 1), "right": nn.Linear(n, 1)} if attention else {}
        return Layer(mix, linear=nn.Linear(n, out), **ends)

    model = nn.Sequential(layer(64, 32), nn.ReLU(), layer(32, 32), nn.ReLU(), layer(32, 10))
    return fit(model, lambda step: F.cross_entropy(model(x), labels), adamw(1e-2), 60)


def multi_task() -> Training:
    """Classes and the sum of all pixels, whose losses have different sizes."""
    model = nn.ModuleDict({"trunk": mlp(3, 64, outputs=64)})
    model["classes"], model["sum"] = nn.Linear(64, 10), nn.Linear(64, 1)

    def loss(step: int) -> Tensor:
        x, labels = batch()
        h = model["trunk"](x).relu()
        error = F.mse_loss(model["sum"](h)[:, 0], x.sum(1))
        return F.cross_entropy(model["classes"](h), labels) + 0.1 * error

    return fit(model, loss, adamw(3e-3), 80)


def distillation() -> Training:
    model = nn.ModuleDict({"student": mlp(2, 32), "teacher": mlp(3, 96)})
    x, labels = digits()
    teacher = model["teacher"]
    trained = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(40):
        trained.zero_grad()
        F.cross_entropy(teacher(x), labels).backward()
        trained.step()
    teacher.zero_grad()
    teacher.requires_grad_(False)

    def loss(step: int) -> Tensor:
        x, _ = batch()
        goal = (teacher(x) / 2).softmax(1)
        return F.cross_entropy(model["student"](x) / 2, goal)

    return fit(model, loss, adamw(1e-2), 80)


def second_order() -> Training:
    """A loss behind a step of gradient descent, as in MAML."""
    model = mlp(3, 32)

    def loss(step: int) -> Tensor:
        (x, a), (y, b) = batch(), batch()
        parameters = dict(model.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), a)
        slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), slopes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, moved, (y,)), b)

    return fit(model, loss, adamw(3e-3), 60)


def flow() -> Training:
    """A normalizing flow: affine couplings whose last layers start at zero."""

    def coupling() -> nn.Module:
        net = mlp(3, 64, inputs=32, outputs=64)
        nn.init.zeros_(net[-1].weight)
        return net

    model = nn.ModuleList(coupling() for _ in range(4))

    def loss(step: int) -> Tensor:
        x, _ = batch()
        x = 2 * x - 1 + 0.1 * torch.randn_like(x)
        total = torch.zeros(len(x))
        for net in model:
            a, b = x.chunk(2, 1)
            shift, scale = net(a).chunk(2, 1)
            scale = scale.tanh()
            x = torch.cat([b * scale.exp() + shift, a], 1)
            total = total + scale.sum(1)
        return (0.5 * (x**2).sum(1) - total).mean()

    return fit(model, loss, adamw(1e-3), 80)
