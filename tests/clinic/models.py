"""The clinic's own small models, and builders of tiny ones of transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Layer(nn.Module):
    """A module with these members, and with `call(module, x)` as its forward function."""

    def __init__(self, call: Callable[[Any, Any], Any], **members: Any) -> None:
        super().__init__()
        self.call = call
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Any) -> Any:
        return self.call(self, x)


def mlp(
    depth: int = 3,
    width: int = 64,
    act: Callable[[], nn.Module] = nn.ReLU,
    outputs: int = 10,
    bias: bool = True,
    norm: Callable[[int], nn.Module] | None = None,
    inputs: int = 64,
    gain: float | None = None,
) -> nn.Sequential:
    """Return `depth` layers; `gain`: He's initialization of the hidden ones times this number."""
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        linear = nn.Linear(width if i else inputs, width, bias=bias)
        if gain is not None:
            nn.init.normal_(linear.weight, 0, gain * math.sqrt(2 / linear.in_features))
        layers += [linear, *([norm(width)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def residual(x_to: Callable[[], nn.Module], depth: int, width: int = 64, gate: Any = None) -> Any:
    """Return residual blocks between an input and an output layer; `gate`: first value of a
    factor of each branch (ReZero: 0, LayerScale: 1e-6 for each channel)."""

    def block() -> nn.Module:
        if gate is None:
            return Layer(lambda self, x: x + self.branch(x), branch=x_to())
        first = torch.full((width,) if gate else (1,), float(gate))
        return Layer(
            lambda self, x: x + self.gate * self.branch(x),
            branch=x_to(),
            gate=nn.Parameter(first),
        )

    blocks = [block() for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


def branch(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


def cnn(
    depth: int = 3, width: int = 16, norm: Any = nn.BatchNorm2d, act: Any = nn.ReLU, pool: bool = 1
) -> nn.Sequential:
    def layer(inputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, width, 3, padding=1)
        return [conv, *([norm(width)] if norm else []), act()]

    layers = [module for i in range(depth) for module in layer(width if i else 1)]
    features = 16 * width if pool else 64 * width
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *layers,
        *([nn.MaxPool2d(2)] if pool else []),
        nn.Flatten(),
        nn.Linear(features, 10),
    )


def resnet(
    width: int = 16, depth: int = 3, norm: Any = nn.BatchNorm2d, zero: bool = False, drop: float = 0
) -> nn.Module:
    """Return a residual network; `zero`: zero-init residuals; `drop`: stochastic depth."""

    def block() -> nn.Module:
        def call(self: Any, x: Tensor) -> Tensor:
            if self.training and drop and torch.rand(()) < drop:
                return x
            return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))

        members = {"c1": nn.Conv2d(width, width, 3, padding=1, bias=False), "n1": norm(width)}
        members |= {"c2": nn.Conv2d(width, width, 3, padding=1, bias=False), "n2": norm(width)}
        if zero:
            nn.init.zeros_(members["n2"].weight)
        return Layer(call, **members)

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1),
        *[block() for _ in range(depth)],
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


def recurrent(kind: str = "LSTM", layers: int = 2, width: int = 32) -> nn.Module:
    """Return a network that reads the eight rows of pixels of a digit in turn."""
    return Layer(
        lambda self, x: self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1]),
        rnn=getattr(nn, kind)(8, width, num_layers=layers, batch_first=True),
        head=nn.Linear(width, 10),
    )


def recurrent_language(kind: str = "LSTM", vocab: int = 32, width: int = 48) -> nn.Module:
    return Layer(
        lambda self, t: self.head(self.rnn(self.embed(t))[0]),
        embed=nn.Embedding(vocab, width),
        rnn=getattr(nn, kind)(width, width, num_layers=2, batch_first=True),
        head=nn.Linear(width, vocab),
    )


class StandardizedConv(nn.Conv2d):
    """A convolution of NFNet: its weight is standardized and has a gain for each channel."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        fan = self.weight[0].numel()
        w = self.gain * (self.weight - mean) * torch.rsqrt(var * fan + 1e-4)
        return F.conv2d(x, w, self.bias, padding=self.padding)


def nfnet(depth: int = 3, width: int = 16) -> nn.Module:
    """Return a network without normalization: standardized weights, SkipInit gains of zero."""

    def block() -> nn.Module:
        conv = functools.partial(StandardizedConv, width, width, 3, padding=1)
        return Layer(
            lambda self, x: x + 0.2 * self.skip_gain * self.c2(F.gelu(1.7 * F.gelu(self.c1(x)))),
            c1=conv(),
            c2=conv(),
            skip_gain=nn.Parameter(torch.zeros(())),
        )

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        StandardizedConv(1, width, 3, padding=1),
        *[block() for _ in range(depth)],
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def unet(width: int = 8) -> nn.Module:
    """Return a network that maps images of 8 x 8 pixels (and a noise level) to images."""

    def call(self: Any, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 8, 8)
        a = F.silu(self.enter(x))
        b = F.silu(self.down(a))
        c = F.silu(self.middle(b))
        d = F.silu(self.up(torch.cat([b, c], 1)))
        return self.leave(torch.cat([a, d], 1)).flatten(1)

    return Layer(
        call,
        enter=nn.Conv2d(1, width, 3, padding=1),
        down=nn.Conv2d(width, 2 * width, 3, 2, 1),
        middle=nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        up=nn.ConvTranspose2d(4 * width, width, 2, 2),
        leave=nn.Conv2d(2 * width, 1, 3, padding=1),
    )


def autoencoder(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, 32), act(), nn.Linear(32, 8), act()),
        *(nn.Linear(8, 32), act(), nn.Linear(32, 64)),
    )


def low_rank(linear: nn.Linear, rank: int = 4) -> nn.Module:
    """Return a frozen layer with a low-rank update (LoRA) that starts at zero."""
    linear.requires_grad_(False)
    n = linear.in_features
    return Layer(
        lambda self, x: self.base(x) + x @ self.lora_a.T @ self.lora_b.T,
        base=linear,
        lora_a=nn.Parameter(torch.randn(rank, n) / n**0.5),
        lora_b=nn.Parameter(torch.zeros(linear.out_features, rank)),
    )


_TEXT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_VISION = {"num_channels": 1, "num_labels": 10, "image_size": 8, "patch_size": 2}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def transformers(name: str, model: str, **config: Any) -> nn.Module:
    """Return a tiny model of transformers: the name of the config, and that of the class."""
    import transformers as library

    made = getattr(library, f"{name}Config")(**config)
    return getattr(library, model)(made).train()


def text(name: str, kind: str = "ForCausalLM", **config: Any) -> nn.Module:
    return transformers(name, name + kind, **{**_TEXT, **config})


def vision(name: str, kind: str = "ForImageClassification", depth: int = 3, **config: Any) -> Any:
    swin = name.startswith("Swin")
    sizes = _VISION if swin else {**_VISION, **_SMALL, "num_hidden_layers": depth}
    return transformers(name, name + kind, **{**sizes, **config})


def gpt2(depth: int = 2, kind: str = "GPT2LMHeadModel", **config: Any) -> nn.Module:
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": depth, "n_head": 2, "n_positions": 64}
    return transformers("GPT2", kind, **{**sizes, **config})
