"""The models that are summarised: real shapes, random weights, gradients of a real backward pass.

A name, what the README calls it, and a function that builds it with a gradient on every parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

_SEED = 0
_BATCH = 32
_TOKENS = 64


@dataclass(frozen=True)
class Model:
    """A model to be summarised."""

    name: str
    title: str
    build: Callable[[torch.device], nn.Module]


def _mlp(widths: list[int], device: torch.device) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(device)
    inputs = torch.rand(_BATCH, widths[0], device=device)
    labels = torch.randint(widths[-1], (_BATCH,), device=device)
    _backward(nn.functional.cross_entropy(model(inputs), labels))
    return model


def _seed_mlp(device: torch.device) -> nn.Module:
    """4 parameters, the size of a first example on 8 x 8 digits."""
    return _mlp([64, 64, 10], device)


def _deep_mlp(device: torch.device) -> nn.Module:
    """16 layers, 32 parameters, which fit in cache."""
    return _mlp([64, *[256] * 15, 10], device)


def _gpt2(device: torch.device) -> nn.Module:
    """GPT-2 of 124 M parameters in float32; its token embedding is also its output layer."""
    transformers = _transformers()
    return _after_backward(transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device))


def _llama(device: torch.device) -> nn.Module:
    """134 M parameters in bfloat16, in Llama's shapes."""
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    return _after_backward(transformers.LlamaForCausalLM(config).to(device, torch.bfloat16))


def _many(parameters: int, elements: int, device: torch.device) -> nn.Module:
    """Parameters of one dimension in one list: all cost is a tensor's, not its elements'."""
    model = nn.ParameterList(torch.randn(elements, device=device) for _ in range(parameters))
    _backward(torch.cat(tuple(model)).sin().sum())
    return model


def _after_backward(model: Any) -> nn.Module:
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (1, _TOKENS), device=device)
    _backward(model(input_ids=tokens, labels=tokens).loss)
    return model  # type: ignore[no-any-return]


def _backward(loss: torch.Tensor) -> None:
    loss.backward()


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="this model needs transformers")


MODELS = (
    Model("seed_mlp", "MLP of 4 parameters", _seed_mlp),
    Model("mlp_16_layers", "MLP of 16 layers", _deep_mlp),
    Model("gpt2", "GPT-2, 124 M parameters, float32", _gpt2),
    Model("llama_bfloat16", "Llama-shaped, 134 M parameters, bfloat16", _llama),
    Model("tensors_of_16", "1,000 parameters of 16 elements", partial(_many, 1000, 16)),
    Model("tensors_of_100", "5,000 parameters of 100 elements", partial(_many, 5000, 100)),
)


def build(model: Model, device: torch.device) -> nn.Module:
    """The same weights and gradients at every run, and a gradient on every parameter."""
    torch.manual_seed(_SEED)
    built = model.build(device)
    without = [name for name, p in built.named_parameters() if p.grad is None]
    assert not without, f"parameters without a gradient: {without}"
    return built


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under its name, every gradient under its name + ".grad"."""
    named = {}
    for name, p in model.named_parameters():
        named[name] = p.detach()
        if p.grad is not None:
            named[f"{name}.grad"] = p.grad
    return named


def size(named: dict[str, torch.Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in named.values())
