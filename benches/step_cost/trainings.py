"""The trainings of benches.step_cost: real models on real or random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benches.models import gpt2_config
from benches.step_cost.tools import Run
from tests.fake_device import scaled


@dataclass(frozen=True)
class Training:
    """A model, its optimizer, and a function that computes the loss of the next batch."""

    title: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def step(self, run: Run) -> None:
        self.backward()
        run()
        self.optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """A training, and how many turns and steps of it are timed."""

    name: str
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
    model: Any = transformers.GPT2LMHeadModel(gpt2_config())
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (scaled(16), scaled(512, 16)) if on_gpu else (1, 128)
    tokens = torch.randint(model.config.vocab_size, shape, device=device)

    def loss() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    title = f"GPT-2, 124 M parameters, {tokens.numel():,} tokens"
    return Training(title, model, optimizer, loss)


def _resnet(device: torch.device) -> Training:
    """ResNet-18 on random images."""
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    )
    model: Any = transformers.ResNetForImageClassification(config)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(32, 3, 128, 128, device=device)
    labels = torch.randint(2, (32,), device=device)
    title = "ResNet-18, 32 images of 128 x 128"
    return Training(title, model, optimizer, lambda: model(images, labels).loss)


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

    return Training("MLP of 6 parameters, 64 digits", model, optimizer, loss)


RECIPES = (
    Recipe("gpt2", _gpt2, turns=scaled(9, 2), steps=1, untimed_steps=1),
    Recipe("resnet", _resnet, turns=11, steps=1, untimed_steps=1),
    Recipe("mlp", _mlp, turns=15, steps=50, untimed_steps=5),
)
