"""The data of the clinic: handwritten digits, and sequences of tokens with a rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 images of 64 pixels in [0, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@functools.cache
def images(size: int = 8, channels: int = 1) -> Tensor:
    """Return the digits as images of another size, with about mean 0 and standard deviation 1."""
    x = (digits()[0].view(-1, 1, 8, 8) - 0.3) / 0.37
    x = x if size == 8 else F.interpolate(x, size=size, mode="bilinear")
    return x.repeat(1, channels, 1, 1)


def batch(n: int = 64) -> tuple[Tensor, Tensor]:
    """Return random digits and their labels."""
    x, labels = digits()
    rows = torch.randint(0, len(x), (n,))
    return x[rows], labels[rows]


def tokens(batch: int, length: int, vocab: int) -> Tensor:
    """Return sequences in which each token is one of two functions of the token before."""
    out = torch.randint(0, vocab, (batch, length))
    for t in range(1, length):
        out[:, t] = (5 * out[:, t - 1] + 3 + torch.randint(0, 2, (batch,))) % vocab
    return out


def output(out: Any) -> Tensor:
    """Return the tensor in the output of a model, which is one of transformers or our own."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name)
    return out


def classify(
    model: nn.Module,
    size: int | None = None,
    channels: int = 1,
    batch: int = 64,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Callable[[int], Tensor]:
    """Return the loss of the digits' classes; `size`: as images. A batch of 0: all of them."""
    x, labels = digits()
    x = (x if size is None else images(size, channels)).to(dtype)

    def loss(step: int) -> Tensor:
        rows = torch.randint(0, len(x), (batch,)) if batch else slice(None)
        out = output(model(x[rows])).float()
        return F.cross_entropy(out, labels[rows], reduction=reduction)

    return loss


def language(
    model: nn.Module, vocab: int = 32, batch: int = 16, length: int = 16, reduction: str = "mean"
) -> Callable[[int], Tensor]:
    """Return the loss of predicting the next token."""

    def loss(step: int) -> Tensor:
        t = tokens(batch, length, vocab)
        out = output(model(t[:, :-1])).float()
        return F.cross_entropy(out.flatten(0, 1), t[:, 1:].flatten(), reduction=reduction)

    return loss


def masked(model: nn.Module, vocab: int = 32, batch: int = 16, length: int = 16) -> Any:
    """Return the loss of predicting tokens that were replaced by the token 0."""

    def loss(step: int) -> Tensor:
        t = tokens(batch, length, vocab - 1) + 1
        hidden = torch.rand(t.shape) < 0.3
        out = output(model(t.masked_fill(hidden, 0)))
        return F.cross_entropy(out[hidden].float(), t[hidden])

    return loss


def regress(model: nn.Module, scale: float = 1.0, shift: float = 0.0, batch: int = 64) -> Any:
    """Return the squared error of a smooth function of the pixels, scaled and shifted."""
    x = digits()[0]
    target = (x[:, :32].sum(1) - x[:, 32:].sum(1)).tanh() * scale + shift

    def loss(step: int) -> Tensor:
        rows = torch.randint(0, len(x), (batch,))
        return F.mse_loss(model(x[rows]).squeeze(1), target[rows])

    return loss


def reconstruct(model: nn.Module, batch: int = 64, noise: float = 0.0) -> Callable[[int], Tensor]:
    """Return the squared error of the model's reconstruction of the pixels."""
    x = digits()[0]

    def loss(step: int) -> Tensor:
        rows = x[torch.randint(0, len(x), (batch,))]
        return F.mse_loss(model(rows + noise * torch.randn_like(rows)), rows)

    return loss
