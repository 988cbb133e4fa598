"""The health check: values, rows and distributions of weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from paramstats import FindingCode, Severity, Summary, summarize
from paramstats._summary import record_of
from tests.findings_models import (
    digits,
    found,
    mlp,
    one_thread,
    train,
    transformer,
)

__all__ = ["digits", "one_thread"]  # fixtures


def test_diverged_weights(digits):
    torch.manual_seed(0)
    model = transformer()
    train(model, digits, 4, torch.optim.SGD(model.parameters(), lr=1e6))
    huge = found(summarize(model))[FindingCode.HUGE_WEIGHT]
    assert huge
    assert "bert.encoder.layer.0.attention.self.value.weight" in str(huge)


def test_pruned_weight_is_only_information(backend):
    from torch.nn.utils import prune

    model = mlp()
    prune.random_unstructured(model[2], "weight", amount=0.95)
    prune.remove(model[2], "weight")
    (finding,) = summarize(model.requires_grad_(False)).findings()
    assert (finding.code, finding.severity) == (FindingCode.SPARSE_WEIGHT, Severity.INFO)
    assert finding.name == "2.weight" and finding.value == pytest.approx(0.95, abs=1e-3)
    assert summarize(model).findings(sparse_weight=0.97) == ()


def test_buffers_may_be_infinite_but_not_nan(backend):
    model = nn.Module()
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    assert summarize(model, buffers=True).findings() == ()
    model.mask[0, 0] = math.nan
    (finding,) = summarize(model, buffers=True).findings()
    assert (finding.source, finding.name, finding.value) == ("buffer", "mask", 1)
    assert "reset the buffer" in finding.advice


def test_replicas_that_differ():
    record = record_of(summarize({"w": torch.randn(3, 4)}))
    summary = Summary(record._replace(diverged={"w (gradient)": "ranks 1 and 3 differ"}))
    (finding,) = summary.findings()
    assert (finding.code, finding.severity) == (FindingCode.DIVERGED_REPLICAS, Severity.ERROR)
    assert (finding.name, finding.source) == ("w", "grad")
    assert finding.message == "ranks 1 and 3 differ" and "! replicas differ" in summary.table()
    summary = Summary(record._replace(diverged={"w (exp_avg)": "ranks 1 and 3 differ"}))
    (finding,) = summary.filter("w").findings()
    assert (finding.name, finding.source) == ("w", "param")
    assert finding.message == "exp_avg: ranks 1 and 3 differ"


# ---- the scale of a weight


@pytest.mark.parametrize(
    ("layer", "edit"),
    [(2, lambda w: w.mul_(1000)), (0, lambda w: nn.init.normal_(w, std=5))],
    ids=["times 1000", "std 5"],
)
def test_weight_that_is_too_large(backend, layer, edit):
    model = mlp()
    edit(model[layer].weight.data)
    summary = summarize(model)
    (finding,) = summary.findings().at_least(Severity.WARNING)
    assert (finding.code, finding.name) == (FindingCode.HUGE_WEIGHT, f"{layer}.weight")
    assert finding.value == pytest.approx(8 * summary[finding.name].rms, rel=1e-12)
    assert finding.value > finding.threshold == 30


@pytest.mark.parametrize("size", [16, 4096])
def test_new_embedding_is_not_too_large(backend, size):
    assert found(summarize({"weight": nn.Embedding(100, size).weight})) == {}
    trained = {"tokens.weight": 10 * nn.Embedding(100, size).weight}
    assert found(summarize(trained)) == {}, "by its name"


def test_memory_that_was_not_initialized():
    model = mlp()
    model[2].weight.data[0, 0] = math.nan
    (finding,) = summarize(model).findings().at_least(Severity.WARNING)
    assert (finding.code, finding.name) == (FindingCode.NONFINITE_PARAMETER, "2.weight")
    assert "torch.empty" in finding.advice and "learning rate" not in finding.advice


# ---- rows


def dead(model: nn.Sequential, units: int) -> nn.Sequential:
    model[2].bias.data[:units] = -100.0
    return model


def test_rows_of_zeros(backend, digits):
    model = mlp()
    model[2].weight.data[:40] = 0
    for summary in (summarize(model), summarize(model.state_dict())):
        (finding,) = summary.findings().at_least(Severity.WARNING)
        assert (finding.code, finding.name) == (FindingCode.ZERO_ROWS, "2.weight")
        assert finding.value == 40 / 64
        assert finding.message == "40 of 64 rows (0, 1, 2, 3, 4, 5, 6, 7, ...) zero"
    model[2].bias.data[:40] = 1.0  # these units are active, and so get a gradient
    (summary,) = train(model, digits, 1)
    assert found(summary) == {}
    assert found(summary, Severity.INFO)[FindingCode.ZERO_ROWS] == ["2.weight"]
    assert found(summarize(dead(mlp(), 40))) == {}


def test_few_rows_of_zeros_are_normal(backend):
    model = mlp()
    model[2].weight.data[5:20] = 0
    assert found(summarize(model)) == {}
    assert found(summarize(nn.Embedding(3, 4, padding_idx=0))) == {}
    assert found(summarize({"embed.weight": torch.eye(8)[:, :2]})) == {}, "unused tokens"


def test_dead_units(backend, digits):
    """They are certainly dead if the optimizer has no momentum for them after many steps."""
    model = dead(mlp(), 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    summary = train(model, digits, 25, optimizer)[-1]
    assert FindingCode.DEAD_UNITS not in found(summary)
    assert found(summary, Severity.INFO)[FindingCode.DEAD_UNITS] == ["2.weight"]
    summary = summarize(model, optimizer=optimizer)
    (finding,) = summary.findings().at_least(Severity.WARNING)
    assert (finding.code, finding.name) == (FindingCode.DEAD_UNITS, "2.weight")
    assert "rows (0, 1, 2, 3, 4, 5, 6, 7, ...)" in finding.message


def test_units_that_are_inactive_in_one_batch_are_normal(digits):
    images, labels = digits
    summaries = train(mlp(), (images[:1], labels[:1]), 5)
    assert [found(summary) for summary in summaries] == [{}] * 5


def test_tokens_that_did_not_occur_are_normal(backend):
    for name in ("embedding", "anything"):
        model = nn.ModuleDict({name: nn.Embedding(100, 8), "head": nn.Linear(8, 10)})
        hidden = model[name](torch.arange(3))
        model["head"](hidden).sum().backward()
        assert summarize(model).findings() == ()


def test_experts_without_tokens(backend):
    experts = nn.Parameter(torch.randn(8, 16, 16))
    experts[[0, 1, 4]].square().sum().backward()
    (finding,) = summarize({"experts": experts}).findings()
    assert (finding.code, finding.severity) == (FindingCode.DEAD_UNITS, Severity.INFO)
    assert finding.message.startswith("rows 2, 3, 5, 6, 7 of 8 ")
    optimizer = torch.optim.AdamW([experts])
    for _ in range(20):
        optimizer.step()
    summary = summarize({"experts": experts}, optimizer=optimizer)
    assert found(summary) == {FindingCode.DEAD_UNITS: ["experts"]}


def test_equal_rows(backend):
    model = mlp()
    model[2].weight.data[:] = model[2].weight.data[:1].clone()
    assert found(summarize(model)) == {}, "rows are not known"
    (finding,) = summarize(model, rows=True).findings().at_least(Severity.WARNING)
    assert (finding.code, finding.name) == (FindingCode.EQUAL_ROWS, "2.weight")
    assert finding.value == 1 and finding.message.endswith(" equal to each other")
    model[2].weight.data[:32] = torch.randn(1, 64)
    (finding,) = summarize(model, rows=True).findings().at_least(Severity.WARNING)
    assert finding.message.endswith(" equal to another one, in 2 groups")
    model[2].weight.requires_grad_(False)
    assert found(summarize(model, rows=True)) == {}


# ---- distributions


def test_heavy_tails(backend):
    torch.manual_seed(0)
    w = torch.randn(256, 256)
    assert summarize({"w": w}, distribution=True).findings() == ()
    w[3, 3] = 300.0
    (finding,) = summarize({"w": w}, distribution=True).findings()
    assert (finding.code, finding.severity) == (FindingCode.HEAVY_TAILS, Severity.INFO)
    assert "the largest element is 19" in finding.message


@pytest.mark.parametrize("scale", [1.0, 1024.0, 1000.0])
def test_elements_that_become_zero_in_float8(backend, scale):
    torch.manual_seed(0)
    w = nn.Parameter(torch.ones(64, 64))
    w.grad = torch.randn(64, 64)
    w.grad[:20] *= 1e-14
    w.grad[:20, 0] = 1.0
    options = {"distribution": True, "grad_scale": scale}
    findings = summarize({"w": w}, **options).findings()
    (finding,) = (f for f in findings if f.code == FindingCode.LOW_PRECISION)
    assert finding.value == pytest.approx(20 / 64 * 63 / 64, abs=1e-3)
    assert finding.message == "30.8% of the elements would become 0 in float8_e5m2"
    w.grad = torch.randn(64, 64) * 1e-9
    codes = {f.code for f in summarize({"w": w}, **options).findings()}
    assert FindingCode.LOW_PRECISION not in codes, "small, but a scale helps"


def test_infinity_with_a_distribution_is_named():
    weight = torch.randn(16, 16)
    weight[3, 4] = math.inf
    (finding,) = summarize({"weight": weight}, distribution=True).findings()
    assert finding.code == FindingCode.NONFINITE_PARAMETER


def test_constant_image_is_only_information(backend):
    image = nn.Parameter(torch.full((8, 8), 0.5))
    (image * torch.randn(8, 8)).sum().backward()
    assert found(summarize({"image": image})) == {}
    assert found(summarize({"weight": image})) == {FindingCode.CONSTANT_WEIGHT: ["weight"]}


@pytest.mark.parametrize(("scale", "is_alarm"), [(1.0, True), (1e-3, False)])
def test_large_weights_that_forward_scales_down(backend, digits, scale, is_alarm):
    model = mlp()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight /= 1e-3
    images, labels = digits
    hidden = images[:64]
    for i, layer in enumerate(model[::2]):
        hidden = nn.functional.linear(hidden.relu() if i else hidden, layer.weight * scale)
    nn.functional.cross_entropy(hidden, labels[:64]).backward()
    assert (FindingCode.HUGE_WEIGHT in found(summarize(model))) == is_alarm
