"""The models of the benchmarks: real shapes, random weights, gradients of a real backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.fake_device import scaled

_BATCH = 32
_TOKENS = 64
_GIB = 1 << 30
_PIECE = 1 << 26
"""Elements that are generated at a time, in float32."""


@dataclass(frozen=True)
class Model:
    """A model: `title` is its name in the tables; `build` returns it with all gradients."""

    name: str
    title: str
    build: Callable[[torch.device], nn.Module]
    device: str | None = None
    """The only device on which it is measured."""


def _mlp(widths: list[int], device: torch.device) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(device)
    inputs = torch.rand(_BATCH, widths[0], device=device)
    labels = torch.randint(widths[-1], (_BATCH,), device=device)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    return model


def _gpt2(device: torch.device) -> nn.Module:
    """GPT-2 with 124 M parameters in float32; its token embedding is also its output layer."""
    transformers = pytest.importorskip("transformers", reason="for this model")
    return _after_backward(transformers.GPT2LMHeadModel(gpt2_config()).to(device))


def gpt2_config() -> Any:
    """Return the configuration of GPT-2 with 124 M parameters. Raises ImportError."""
    import transformers

    return transformers.GPT2Config(
        vocab_size=scaled(50_257, 120), n_embd=scaled(768, 48), n_layer=scaled(12, 1)
    )


def _llama(device: torch.device) -> nn.Module:
    """A model with Llama's shapes and 134 M parameters in bfloat16."""
    transformers = pytest.importorskip("transformers", reason="for this model")
    config = transformers.LlamaConfig(
        vocab_size=scaled(32_000, 120),
        hidden_size=scaled(768, 48),
        intermediate_size=scaled(2048, 64),
        num_hidden_layers=scaled(12, 1),
        num_attention_heads=12,
    )
    return _after_backward(transformers.LlamaForCausalLM(config).to(device, torch.bfloat16))


def many(parameters: int, elements: int, device: torch.device) -> nn.Module:
    """Many small parameters: the overhead per tensor dominates."""
    parameters = scaled(parameters, 20)
    model = nn.ParameterList(torch.randn(elements, device=device) for _ in range(parameters))
    torch.cat(tuple(model)).sin().sum().backward()
    return model


def _one_tensor(nbytes: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """One parameter without a gradient."""
    nbytes = scaled(nbytes)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 3 * nbytes:
        pytest.skip("too little free memory on the GPU")
    return _of(filled(nbytes // dtype.itemsize, dtype, device))


def _of(tensor: torch.Tensor) -> nn.Module:
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=False)])


_BLOCK_BYTES = (1_000_000, 1 << 20)


def repeating(nbytes: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, int]:
    """Return one parameter on the CPU that repeats a block, the block, and the repetitions.

    The block is small enough for the oracle.
    """
    block_bytes = next((b for b in _BLOCK_BYTES if nbytes % b == 0), nbytes)
    block = filled(block_bytes // dtype.itemsize, dtype, torch.device("cpu"))
    repeats = nbytes // block_bytes
    return _of(block.repeat(repeats)), _of(block), repeats


def filled(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return normally distributed values, or uniformly distributed integers."""
    torch.manual_seed(0)
    tensor = torch.empty(numel, dtype=dtype, device=device)
    for piece in tensor.split(_PIECE):
        if dtype.is_floating_point:
            piece.copy_(torch.randn(piece.shape, device=device))
        else:
            piece.random_(-128, 128)
    return tensor


def _after_backward(model: Any) -> nn.Module:
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (1, _TOKENS), device=device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return model  # type: ignore[no-any-return]


def _in_gpu_memory(nbytes: int, dtype: torch.dtype) -> Model:
    size = f"{nbytes // _GIB} GiB" if nbytes >= _GIB else f"{nbytes // 10**6} MB"
    title = f"{size} of {str(dtype).removeprefix('torch.')}"
    name = title.replace(" of ", "_").replace(" ", "_")
    return Model(name, title, partial(_one_tensor, nbytes, dtype), "cuda")


MODELS = (
    Model("seed_mlp", "MLP of 4 parameters", partial(_mlp, [64, 64, 10])),
    Model("mlp_16_layers", "MLP of 16 layers", partial(_mlp, [64, *[256] * 15, 10])),
    Model("gpt2", "GPT-2, 124 M parameters, float32", _gpt2),
    Model("llama_bfloat16", "Llama-shaped, 134 M parameters, bfloat16", _llama),
    Model("tensors_of_16", "1,000 parameters of 16 elements", partial(many, 1000, 16)),
    Model("tensors_of_100", "5,000 parameters of 100 elements", partial(many, 5000, 100)),
    _in_gpu_memory(2 * _GIB, torch.float32),
    _in_gpu_memory(2 * _GIB, torch.bfloat16),
    _in_gpu_memory(_GIB, torch.float8_e4m3fn),
    _in_gpu_memory(_GIB, torch.int8),
    _in_gpu_memory(32_000_000, torch.float32),
    _in_gpu_memory(32_000_000, torch.bfloat16),
)


def build(model: Model, device: torch.device) -> nn.Module:
    """Build a model with the same weights and gradients on every run."""
    torch.manual_seed(0)
    return model.build(device)


def by_name(name: str, device: torch.device) -> nn.Module:
    return build(next(model for model in MODELS if model.name == name), device)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter under its name, every gradient under its name + ".grad"."""
    named = {}
    for name, p in model.named_parameters():
        named[name] = p.detach()
        if p.grad is not None:
            named[f"{name}.grad"] = p.grad
    return named
