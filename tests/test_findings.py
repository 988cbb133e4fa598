"""The health check: it is silent about healthy trainings; its thresholds and its results."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from paramstats import FindingCode, Findings, Severity, Thresholds, summarize
from paramstats._core.entries import entries
from paramstats._findings import rules
from paramstats._findings.rules import find
from paramstats._summary import record_of
from tests.findings_models import (
    Layer,
    convolutional,
    deep,
    digits,
    embedding,
    found,
    lora,
    mlp,
    one_thread,
    recurrent,
    train,
    transformer,
    weight_norm,
    zero_positions,
    zero_residual,
)

__all__ = ["digits", "one_thread"]  # fixtures


@pytest.mark.parametrize(
    "optimizer_of",
    [
        functools.partial(torch.optim.AdamW, lr=1e-3),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    ],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("build", [mlp, convolutional, recurrent, transformer])
def test_healthy_training_has_no_warnings(digits, build, optimizer_of):
    torch.manual_seed(0)
    model = build()
    optimizer = optimizer_of(model.parameters())
    warnings = [
        f"step {step}: {finding}"
        for step, summary in enumerate(train(model, digits, 200, optimizer))
        for finding in summary.findings().at_least(Severity.WARNING)
    ]
    assert warnings == []
    (finding,) = summarize(build()).findings()
    assert (finding.severity, finding.code) == (Severity.INFO, FindingCode.MISSING_GRADIENT)
    assert finding.name == "" and "(model)" in repr(finding), "a new model"
    assert found(summarize(model.state_dict())) == {}


@pytest.mark.parametrize("layer", [lora, zero_residual, zero_positions, embedding, weight_norm])
def test_weights_initialized_to_zero_or_one_are_no_warning(backend, digits, layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.Linear(64, 10))
    assert found(summarize(model)) == {}, "a new model"
    assert [found(summary) for summary in train(model, digits, 20)] == [{}] * 20


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8),  # a new bias
        torch.ones(8),  # a new normalization
        torch.zeros(1, 1, 8),  # a new class token
        torch.zeros(4, 4, dtype=torch.int64),  # counters
        torch.ones(4, 4, dtype=torch.bool),
        torch.randn(4, 4).bfloat16(),
        torch.empty(0, 4),
        torch.empty(4, 4, device="meta"),
        torch.tensor(0.0),
        nn.LazyLinear(4).weight,
    ],
)
def test_constant_tensors_that_are_no_weights_have_no_findings(backend, tensor):
    findings = summarize({"x": tensor}).findings()
    assert [finding for finding in findings if finding.name] == []


@pytest.mark.parametrize("gate", [0.0, 1e-6, 1e-1])
def test_blocks_behind_small_gates_are_healthy(digits, gate):
    """LayerScale and ReZero: gradients of the blocks are up to 1e6 times smaller at first."""
    torch.manual_seed(0)

    def block() -> nn.Module:
        return Layer(
            lambda self, x: x + self.gate * self.second(torch.relu(self.first(self.norm(x)))),
            norm=nn.LayerNorm(64),
            first=nn.Linear(64, 128),
            second=nn.Linear(128, 64),
            gate=nn.Parameter(torch.full((64,), gate)),
        )

    model = nn.Sequential(nn.Linear(64, 64), *[block() for _ in range(8)], nn.Linear(64, 10))
    assert [found(summary) for summary in train(model, digits, 5)] == [{}] * 5


@pytest.mark.parametrize("layers", [20, 50])
def test_deep_network_with_a_good_initialization_is_healthy(digits, layers):
    model = deep(layers, std=(2 / 64) ** 0.5)
    assert [found(summary) for summary in train(model, digits, 3)] == [{}] * 3


def test_any_scale_of_the_loss_is_healthy(digits):
    for factor in (1e-6, 1e4):
        model = mlp()

        def loss(out: Tensor, labels: Tensor, factor: float = factor) -> Tensor:
            return factor * nn.functional.cross_entropy(out, labels)

        summaries = train(model, digits, 3, torch.optim.AdamW(model.parameters()), loss)
        assert [found(summary) for summary in summaries] == [{}] * 3


def test_the_time_is_linear_in_the_number_of_tensors(monkeypatch):
    """Every rule visits each tensor a fixed number of times."""
    visited = 0

    class Counted(list):
        def __iter__(self):
            nonlocal visited
            visited += len(self)
            return super().__iter__()

    monkeypatch.setattr(rules, "entries", lambda record, with_state: Counted(entries(record)))
    source = {str(i): torch.randn(2, 2, requires_grad=True) for i in range(300)}
    sum(map(torch.sum, source.values())).backward()
    find(record_of(summarize(source)), Thresholds())
    assert 0 < visited <= 20 * len(source)


# ---- thresholds


def test_thresholds_are_adjustable_and_exact(backend):
    w = torch.ones(2, 8, requires_grad=True)
    with torch.no_grad():
        w[0, 0] = 0.5
    w.grad = torch.full((2, 8), 10.0)
    summary = summarize({"w": w})
    (finding,) = summary.findings(largest_gradient_ratio=1)
    ratio = finding.value
    assert ratio == pytest.approx(summary["w"].grad.norm / summary["w"].norm, rel=1e-12)
    assert summary.findings(largest_gradient_ratio=ratio) == ()
    below = math.nextafter(ratio, 0)
    (finding,) = summary.findings(Thresholds(largest_gradient_ratio=below))
    assert finding.value == ratio and finding.threshold == below


@pytest.mark.parametrize(
    ("thresholds", "changes"),
    [
        (None, {"sparse_weight": 0.5}),
        ({"sparse_weight": 0.5}, {}),
        ({"sparse_weight": 0.8}, {"sparse_weight": 0.5}),
        (Thresholds(overflow=0.5), {"sparse_weight": 0.5}),
    ],
)
def test_thresholds_can_be_a_dict_or_keywords(thresholds, changes):
    (finding,) = summarize({"w": torch.eye(4)}).findings(thresholds, **changes)
    assert finding.threshold == 0.5


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (
            (),
            {"sparse": 0.5},
            "the name of a threshold, got 'sparse'; did you mean 'sparse_weight'",
        ),
        (({"zzz": 0.5},), {}, "got 'zzz'; use one of exploding_activation, vanishing_gradient, "),
        (
            (0.5,),
            {},
            "or a dict for thresholds, got 0.5; name the threshold, such as sparse_weight",
        ),
    ],
)
def test_unknown_threshold_is_an_error_with_a_hint(arguments, keywords, message):
    with pytest.raises(TypeError, match=rf"^paramstats\.findings: expected .*{message}"):
        summarize({"w": torch.eye(4)}).findings(*arguments, **keywords)


@pytest.mark.parametrize("value", [-1.0, math.nan, "1", None])
def test_threshold_must_be_a_number(value):
    with pytest.raises(ValueError, match="expected a number of 0 or more for overflow, got "):
        Thresholds(overflow=value)


# ---- results


def test_most_severe_finding_comes_first(backend, model):
    model[0].weight.grad.zero_()
    model[0].bias.grad.zero_()
    model[2].weight.data[0, 0] = math.inf
    findings = summarize(model).findings()
    assert [f.severity for f in findings] == [Severity.ERROR, Severity.WARNING, Severity.INFO]
    assert [f.name for f in findings] == ["2.weight", "0.weight", "0.bias"]
    assert findings.at_least(Severity.ERROR) == findings[:1]
    with pytest.raises(TypeError, match=r"a paramstats\.Severity, got 'error'"):
        findings.at_least("error")


def test_findings_print_as_a_report():
    source = {f"w{i}": torch.zeros(3, 4) for i in range(25)} | {"x": torch.tensor([math.nan])}
    findings = summarize(source).findings()
    lines = str(findings).splitlines()
    assert lines[0].startswith("ERROR NaN or Inf in parameter: ")
    assert lines[2] == "    x  1 NaN of 1 element"
    assert lines[3].startswith("WARNING zero weight: ") and lines[5].split()[0] == "w0"
    assert lines[5] == "    w0  all 12 elements zero" and lines[-1] == "    ... and 15 more"
    assert len(lines) == 16 and max(map(len, lines)) <= 100
    assert repr(findings) == str(findings)
    assert repr(summarize({"w": torch.randn(3, 4)}).findings()) == "no findings"


def test_findings_as_html_are_escaped():
    source = {"<b>": torch.zeros(3, 4)} | {f"w{i}": torch.zeros(3, 4) for i in range(15)}
    html = summarize(source).findings()._repr_html_()
    assert "<code>&lt;b&gt;</code> all 12 elements zero" in html and "<b>" not in html
    assert html.count("<tr") == 1 and "... and 6 more" in html and "WARNING" in html
    assert summarize({"w": torch.eye(2)}).findings()._repr_html_() == "<p>no findings</p>"


def test_finding_can_be_serialized(backend, model):
    model[0].weight.grad.zero_()
    (finding,) = summarize(model).findings()
    record = {**vars(finding), "severity": finding.severity.name}
    assert json.loads(json.dumps(record))["code"] == "zero gradient"
    assert str(finding).startswith("WARNING 0.weight: zero gradient: all 48 elements zero. No ")
    assert repr(finding) == "<WARNING 0.weight: zero gradient: all 48 elements zero>"
    begun, ended = replace(finding, step=2000), replace(finding, step=7, end=9)
    assert str(begun).startswith("step 2,000: WARNING 0.weight: zero gradient: all 48 ")
    assert str(ended).startswith("step 7, ended at step 9: WARNING 0.weight: zero gradient: ")
    assert "    0.weight  step 7, ended at step 9: all 48 " in str(Findings([ended]))
    assert finding == summarize(model).findings()[0] and len({finding, finding}) == 1


def test_findings_with_different_advice_are_listed_apart():
    lora = nn.Parameter(torch.zeros(4, 4))
    lora.grad = torch.ones(4, 4)
    frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    report = str(summarize({"frozen": frozen, "lora_B": lora}).findings())
    assert report.count("zero weight:") == 2
