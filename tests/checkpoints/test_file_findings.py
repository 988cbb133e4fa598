"""Findings in checkpoint files: what is reported, and advice that does not speak of training."""

from __future__ import annotations

import math

import pytest
import torch

from paramstats.checkpoints import summarize_file

INF, NAN = math.inf, math.nan
MASK = torch.full((4, 4), -INF).triu(1)
TINY = torch.full((4, 4), 3e-6).half()

CASES = {
    "NaN": ({"w": torch.tensor([1.0, NAN])}, "ERROR", "Use an earlier checkpoint"),
    "Inf": ({"w": torch.tensor([1.0, INF])}, "ERROR", "Use an earlier checkpoint"),
    "-Inf among values": ({"w": torch.tensor([1.0, 2.0, -INF])}, "ERROR", "an earlier checkpoint"),
    "only -Inf": ({"w": torch.tensor([-INF])}, "ERROR", "Use an earlier checkpoint"),
    "zero": ({"w": torch.zeros(4, 4)}, "WARNING", "never trained, was pruned, or was lost"),
    "untrained LoRA": ({"x.lora_up.weight": torch.zeros(4, 2)}, "WARNING", "untrained"),
    "untrained LoRA of peft": ({"x.lora_B.weight": torch.zeros(4, 2)}, "WARNING", "untrained"),
    "constant": ({"w": torch.full((4, 4), 0.5)}, "WARNING", "not initialized randomly"),
    "huge": ({"w": 1e3 * torch.eye(4)}, "WARNING", "lacks the scale of a quantized weight"),
    "near overflow": ({"w": torch.tensor([4e4, 1.0]).half()}, "WARNING", "Save the weights in"),
    "underflow": ({"w": TINY * (1 - torch.eye(4)).half()}, "WARNING", "a wider dtype"),
    "optimizer": ({"state": {0: {"exp_avg": torch.tensor(NAN)}}}, "ERROR", "optimizer's state"),
    "other": ({"rng": torch.tensor(NAN)}, "ERROR", "not weights of the model"),
}


@pytest.mark.parametrize("case", CASES)
def test_advice_is_about_the_file(tmp_path, case):
    tensors, severity, advice = CASES[case]
    torch.save(tensors, tmp_path / "a.pt")
    findings = summarize_file(tmp_path / "a.pt").findings()
    found = next(f for f in findings if advice in f.advice)
    assert found.severity.name == severity and found is findings[0]
    for finding in findings:
        for word in ("learning rate", "gradient", "optimizer update", "loss", "step with"):
            assert word not in finding.advice.replace("first step with NaN", "")


HEALTHY = {
    "mask": {"attn.mask": MASK},
    "zeros and constants of an optimizer": {
        "model": {"w": torch.eye(4)},
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(4, 4), "square_avg": torch.zeros(4, 4)}}
        },
        "rng": torch.full((4, 4), 1e9),
    },
    "parameters": {"w": torch.nn.Parameter(torch.eye(4)), "b": torch.zeros(4)},
}


@pytest.mark.parametrize("case", HEALTHY)
def test_nothing_is_reported(tmp_path, case):
    torch.save(HEALTHY[case], tmp_path / "a.pt")
    assert summarize_file(tmp_path / "a.pt").findings() == ()


def test_a_healthy_training_checkpoint_has_no_finding(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(64, 16),
        torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
        torch.nn.Linear(16, 64),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(9, (2, 8))
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**content, "rng": torch.get_rng_state(), "epoch": 1}, tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    assert summary.findings() == () and summary.total.count == sum(
        p.numel() for p in model.parameters()
    )
