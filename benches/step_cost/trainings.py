"""The trainings of benches.step_cost: real models on real or random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benches.step_cost.tools import Run


class Training:
    """A model, its optimizer, and a function that computes the loss of the next batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[], torch.Tensor],
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._optimizer = optimizer
        self._loss = loss

    def backward(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()  # type: ignore[no-untyped-call]

    def step(self, run: Run) -> None:
        self.backward()
        run()
        self._optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """A training, and how many turns and steps of it are timed."""

    name: str
    title: str
    build: Callable[[torch.device], Training]
    turns: int
    steps: int
    """Timed steps per turn and tool."""
    untimed_steps: int
    """Steps before them."""


def _gpt2(device: torch.device) -> Training:
    """GPT-2 with a fused AdamW; on a GPU with a larger batch and bfloat16 autocast."""
    import transformers

    on_gpu = device.type == "cuda"
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (16, 512) if on_gpu else (1, 128)
    tokens = torch.randint(model.config.vocab_size, shape, device=device)

    def loss() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return Training(model, optimizer, loss)


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def _resnet(device: torch.device) -> Training:
    """ResNet-18 for images of 32 x 32 pixels, on random images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        stride = 1 if outputs == 64 else 2
        layers += [ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs, 1)]
        inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(32, 3, 32, 32, device=device)
    labels = torch.randint(10, (32,), device=device)
    return Training(model, optimizer, lambda: nn.functional.cross_entropy(model(images), labels))


def _mlp(device: torch.device) -> Training:
    """An MLP on the digits of scikit-learn, 64 per batch."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(digits.target, device=device)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loss() -> torch.Tensor:
        batch = torch.randint(len(labels), (64,), device=device)
        return nn.functional.cross_entropy(model(pixels[batch]), labels[batch])

    return Training(model, optimizer, loss)


RECIPES = (
    Recipe("gpt2", "GPT-2, 124 M parameters, 128 tokens", _gpt2, turns=9, steps=1, untimed_steps=1),
    Recipe(
        "resnet", "ResNet-18, 32 images of 32 x 32", _resnet, turns=11, steps=1, untimed_steps=1
    ),
    Recipe("mlp", "MLP of 6 parameters, 64 digits", _mlp, turns=15, steps=50, untimed_steps=5),
)
