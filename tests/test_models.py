"""Real architectures after a backward pass, against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paramstats
from tests import oracle

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=3000)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 3000, (2, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    return model, {"transformer.wte.weight": ("lm_head.weight",)}


def t5():
    config = transformers.T5Config(
        d_model=64, d_ff=128, num_layers=2, num_heads=4, vocab_size=1000,
        tie_word_embeddings=True, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    ids = torch.randint(0, 1000, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    return model, {"shared.weight": names}


def vit():
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config)
    model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    return model, {}


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=500,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    ids = torch.randint(0, 500, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    return model, {}


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def resnet():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=2), Residual(32), Residual(32), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    model(images).logsumexp(1).mean().backward()
    assert not model[1].body[0].weight.is_contiguous()
    return model, {}


@pytest.mark.parametrize("make", [gpt2, t5, vit, mixtral, resnet], ids=lambda f: f.__name__)
def test_every_statistic_of_every_tensor(backend, make):
    torch.manual_seed(0)
    model, aliases = make()
    summary = paramstats.summarize(model, buffers=True)
    parameters = dict(model.named_parameters())
    assert list(summary) == [*parameters, *dict(model.named_buffers())]
    with_grad = 0
    for name, p in parameters.items():
        oracle.check(summary[name], p)
        if p.grad is None:
            assert summary[name].grad is None
        else:
            oracle.check(summary[name].grad, p.grad)
            with_grad += 1
    assert with_grad > 0
    for name, buffer in model.named_buffers():
        oracle.check(summary[name], buffer)
    for name, others in aliases.items():
        assert set(summary[name].aliases) == set(others)
    assert summary.total.count == sum(p.numel() for p in model.parameters())
    assert not summary.skipped
