"""The health check: gradients that vanish, explode or are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from paramstats import Finding, FindingCode, Severity, Summary, summarize
from tests.findings_models import Layer, deep, digits, found, mlp, one_thread, train

__all__ = ["digits", "one_thread"]  # fixtures


def test_nan_in_the_data(backend, digits):
    def add_nan(step: int, images: Tensor) -> None:
        if step == 1:
            images[5, 7] = math.nan

    before, during, after = train(mlp(), digits, 3, at_step=add_nan)
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert before.findings() == ()
    assert found(during) == {FindingCode.NONFINITE_GRADIENT: names[::-1]}
    assert "comes from the loss or the data" in during.findings()[0].advice
    assert found(after)[FindingCode.NONFINITE_PARAMETER] == names
    gradients = next(f for f in after.findings() if f.code == FindingCode.NONFINITE_GRADIENT)
    assert "Fix the parameters first" in gradients.advice
    first = after.findings()[0]
    assert first.name == "0.weight" and "The first of 6 in model order" in first.advice


def one_step(
    digits: tuple[Tensor, Tensor], dtype: torch.dtype, scale: float = 1.0, reduction: str = "mean"
) -> Summary:
    """Return the summary after a backward pass of `scale` times the loss."""

    def loss(out: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.float(), labels, reduction=reduction) * scale

    return train(mlp(dtype), digits, 1, loss_of=loss)[0]


def test_float16_gradients_near_and_beyond_the_maximum(digits):
    largest = max(entry.grad.abs_max for entry in one_step(digits, torch.float16).values())
    near, over = (one_step(digits, torch.float16, x / largest) for x in (40000, 80000))
    assert set(found(near)) == {FindingCode.OVERFLOW}
    assert any("maximum of float16 6.550e+04" in f.message for f in near.findings())
    (overflown,) = (f for f in over.findings() if f.code == FindingCode.NONFINITE_GRADIENT)
    assert overflown.message.endswith("Inf of 10 elements") and overflown.name == "4.bias"
    assert "a value above 65,504 is Inf" in overflown.advice


def test_float16_gradients_that_underflow(digits):
    half = found(one_step(digits, torch.float16, 1e-4))
    assert half[FindingCode.UNDERFLOW] == ["0.weight", "2.weight", "4.weight"]
    wide = one_step(digits, torch.bfloat16, 1e-4)
    assert FindingCode.UNDERFLOW not in found(wide), "bfloat16 has the range of float32"


@pytest.mark.parametrize("scale", [1e-305, 1.0, 1e305])
def test_values_in_memory_count_at_any_gradient_scale(backend, scale):
    w = torch.eye(4).bfloat16().requires_grad_()
    w.grad = torch.full((4, 4), -60000.0, dtype=torch.bfloat16)
    half = torch.eye(4).half().requires_grad_()
    half.grad = torch.full((4, 4), -60000.0, dtype=torch.float16)
    findings = summarize({"w": w, "half": half}, grad_scale=scale).findings()
    (finding,) = [f for f in findings if f.code in (FindingCode.OVERFLOW, FindingCode.UNDERFLOW)]
    assert (finding.name, finding.value) == ("half", pytest.approx(60000 / 65504))


def test_gradient_scaler_is_part_of_the_value_in_memory(backend):
    """The dtype's range is compared with scaled gradients; statistics are without the scale."""
    w = torch.randn(4, 4).half().requires_grad_()
    w.grad = torch.full((4, 4), 32768.0, dtype=torch.float16)
    summary = summarize({"w": w}, grad_scale=32768.0)
    assert summary["w"].grad.mean == 1
    (finding,) = summary.findings()
    assert finding.code == FindingCode.OVERFLOW
    assert finding.value == pytest.approx(32768 / 65504)
    w.grad[0, 0] = math.inf
    (finding,) = summarize({"w": w}, grad_scale=32768.0).findings()
    assert finding.severity == Severity.INFO and "scaler skips" in finding.advice


def find(summary: Summary, code: FindingCode) -> list[Finding]:
    return [finding for finding in summary.findings() if finding.code == code]


@pytest.mark.parametrize(
    ("layers", "activation"),
    [(8, nn.Sigmoid), (12, nn.Sigmoid), (20, nn.ReLU), (30, nn.ReLU)],
)
def test_gradient_that_vanishes_along_the_depth(digits, layers, activation):
    (summary,) = train(deep(layers, activation), digits, 1)
    findings = find(summary, FindingCode.VANISHING_GRADIENT)
    names = [f"{2 * i}.weight" for i in range(layers)]
    assert [f.name for f in findings] == names[: len(findings)], "the first layers"
    assert findings[0].severity == Severity.WARNING and findings[0].value < 3e-4
    assert set(found(summary)) == {FindingCode.VANISHING_GRADIENT}


@pytest.mark.parametrize("layers", [3, 5, 7])
def test_a_few_layers_without_a_good_initialization_are_healthy(digits, layers):
    (summary,) = train(deep(layers), digits, 1)
    assert found(summary) == {}


def test_weights_that_are_too_small_are_named_and_not_the_healthy_one(digits):
    model = deep(6, std=1e-3)
    nn.init.kaiming_normal_(model[4].weight)
    (summary,) = train(model, digits, 1)
    names = ["0.weight", "2.weight", "6.weight", "8.weight"]
    assert found(summary) == {FindingCode.VANISHING_GRADIENT: names}
    assert "kaiming" in find(summary, FindingCode.VANISHING_GRADIENT)[0].advice


def test_activations_that_vanish_on_their_way_forward(digits):
    """Without biases in the way, the relative gradients of all layers are equally tiny."""
    model = deep(6, std=1e-3)
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    (summary,) = train(model, digits, 1)
    names = [f"{i}.weight" for i in (0, 2, 4, 6, 8)]
    assert found(summary) == {FindingCode.VANISHING_GRADIENT: names}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [1.5, 2.0, 3.0])
def test_activations_that_grow_along_the_depth(digits, gain, bias):
    model = deep(20, std=gain * (2 / 64) ** 0.5, bias=bias)
    (summary,) = train(model, digits, 1)
    (finding,) = summary.findings().at_least(Severity.WARNING)
    assert finding.code == FindingCode.EXPLODING_GRADIENT and "smaller std" in finding.advice
    largest = max(range(19), key=lambda i: summary[f"{2 * i}.weight"].rms)
    assert finding.name == f"{2 * largest}.weight"
    assert 0.2 * gain**19 < finding.value < 2 * gain**19, "the rms of the last input"


def test_activations_that_grow_where_nothing_has_a_bias(digits):
    model = deep(20, std=2 * (2 / 64) ** 0.5, bias=False)
    model[-1].bias = None
    (summary,) = train(model, digits, 1)
    (finding,) = summary.findings().at_least(Severity.WARNING)
    assert finding.code == FindingCode.EXPLODING_GRADIENT


@pytest.mark.parametrize(("std", "is_large"), [(1.0, True), (0.1, False)])
def test_large_weights_explain_gradients_of_zeros(std, is_large):
    """The variance of a normalization overflows, for example, and its inverse becomes 0."""
    model = deep(6, std=std)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[-1].bias.grad.fill_(1.0)
    codes = {FindingCode.ZERO_GRADIENT} | ({FindingCode.EXPLODING_GRADIENT} if is_large else set())
    assert set(found(summarize(model))) == codes


def test_gradient_that_grows_on_its_way_back(digits):
    """Many layers with batch normalization and without residual connections."""
    torch.manual_seed(0)
    layers = [
        layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    ]
    (summary,) = train(nn.Sequential(*layers, nn.Linear(64, 10)), digits, 1)
    (finding,) = summary.findings().at_least(Severity.WARNING)
    assert (finding.code, finding.name) == (FindingCode.EXPLODING_GRADIENT, "0.weight")
    assert finding.value > 1e4 and "on its way back" in finding.advice


def test_input_in_the_wrong_unit(digits):
    """Pixels are a million times larger and the first weight a million times smaller."""
    images, labels = digits
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e-6
    (summary,) = train(model, (images * 1e6, labels), 1)
    (finding,) = summary.findings().at_least(Severity.WARNING)
    assert (finding.code, finding.name) == (FindingCode.EXPLODING_GRADIENT, "0.weight")
    rms = 1e6 * images.square().mean().sqrt().item()
    assert finding.value == pytest.approx(rms, rel=0.5) and "Standardize" in finding.advice


def test_summed_loss_is_no_problem_of_the_model(digits):
    summary = one_step(digits, torch.float32, 1e4, reduction="sum")
    assert found(summary) == {}
    (finding, *_) = summary.findings()
    entry = summary[finding.name]
    assert (finding.severity, finding.code) == (Severity.INFO, FindingCode.GRADIENT_RATIO)
    assert finding.value == pytest.approx(entry.grad.norm / max(entry.norm, 8), rel=1e-12)
    assert finding.value > finding.threshold == 1e3 and "summing it" in finding.advice


def test_large_targets_are_no_problem_of_the_model(digits):
    """Activations grow, because the outputs must, but the weights are not too large."""

    def loss(out: Tensor, labels: Tensor) -> Tensor:
        return (out[:, 0] - 1000.0 * labels).square().mean()

    model = mlp()
    summary = train(model, digits, 250, torch.optim.AdamW(model.parameters()), loss)[-1]
    assert summary["4.weight"].grad.norm > 100 * summary["4.bias"].grad.norm
    assert found(summary) == {}


def test_weight_that_started_at_zero_is_compared_with_a_new_one(digits):
    """Position embeddings: after a step with a small learning rate, they are still tiny."""
    model = Layer(
        lambda self, x: self.head(x + self.positions.flatten()),
        positions=nn.Parameter(torch.zeros(8, 8)),
        head=nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    assert [summary.findings() for summary in train(model, digits, 2, optimizer)][1] == ()
