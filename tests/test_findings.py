"""The health check: it reports problems of real trainings and is silent about healthy ones."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from paramstats import FindingCode, Severity, Summary, Thresholds, summarize
from paramstats._core.entries import entries
from paramstats._findings import rules
from paramstats._findings.rules import find
from paramstats._summary import record_of


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for networks this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images of 64 pixels in [0, 1], and their labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    data = datasets.load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).to(dtype)


def train(
    model: nn.Module,
    digits: tuple[Tensor, Tensor],
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    at_step: Callable[[int, Tensor], None] = lambda step, images: None,
) -> list[Summary]:
    """Train and return a summary after each backward pass; `at_step` may modify the batch."""
    images, labels = digits
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    dtype = next(model.parameters()).dtype
    summaries = []
    for step in range(steps):
        rows = torch.randint(0, len(images), (64,))
        batch = images[rows].to(dtype)
        at_step(step, batch)
        optimizer.zero_grad()
        loss_of(model(batch), labels[rows]).backward()
        summaries.append(summarize(model))
        optimizer.step()
    return summaries


def found(summary: Summary, severity: Severity = Severity.WARNING) -> dict[FindingCode, list[str]]:
    """Return the names of the tensors with each finding."""
    out: dict[FindingCode, list[str]] = {}
    for finding in summary.findings().at_least(severity):
        out.setdefault(finding.code, []).append(finding.name)
    return out


# ---- healthy models


class Layer(nn.Module):
    """A module with these members, and with `call(module, x)` as its forward function."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], **members: object) -> None:
        super().__init__()
        self.call = call
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def convolutional() -> nn.Module:
    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    last = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layer(1, 8), *layer(8, 16), *last)


def recurrent() -> nn.Module:
    return Layer(
        lambda self, x: self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1]),
        lstm=nn.LSTM(8, 32, num_layers=2, batch_first=True),
        head=nn.Linear(32, 10),
    )


def transformer() -> nn.Module:
    """A small BERT whose tokens are every second pixel."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 64, "num_labels": 10}
    config = transformers.BertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)
    bert = transformers.BertForSequenceClassification(config)
    return Layer(lambda self, x: self.bert(input_ids=(x[:, ::2] * 16).long()).logits, bert=bert)


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
    assert summarize(build()).findings() == (), "a new model"
    assert found(summarize(model.state_dict())) == {}


def lora() -> nn.Module:
    """A frozen layer with a low-rank update. B is zero at first, so that A has no gradient."""
    return Layer(
        lambda self, x: self.frozen(x) + x @ self.lora_a.T @ self.lora_b.T,
        frozen=nn.Linear(64, 64).requires_grad_(False),
        lora_a=nn.Parameter(torch.randn(4, 64) / 8),
        lora_b=nn.Parameter(torch.zeros(64, 4)),
    )


def zero_residual() -> nn.Module:
    """A residual branch that outputs zero at first: its last weight is initialized to zero."""
    layer = Layer(
        lambda self, x: x + self.norm(self.second(torch.relu(self.first(x)))),
        first=nn.Linear(64, 64),
        second=nn.Linear(64, 64),
        norm=nn.BatchNorm1d(64),
    )
    nn.init.zeros_(layer.norm.weight)
    return layer


def zero_positions() -> nn.Module:
    """Position tables that are initialized to zero, and a normalization over two dimensions."""
    return Layer(
        lambda self, x: self.norm(x.view(-1, 8, 8) + self.pos_embed + self.bias_table).flatten(1),
        pos_embed=nn.Parameter(torch.zeros(1, 8, 8)),
        bias_table=nn.Parameter(torch.zeros(8, 8)),
        norm=nn.LayerNorm((8, 8)),
    )


def embedding() -> nn.Module:
    """An embedding of pixels whose row for padding is zero."""
    return Layer(
        lambda self, x: self.embedding((16 * x).long()).flatten(1),
        embedding=nn.Embedding(17, 1, padding_idx=0),
    )


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))


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
    assert summarize({"x": tensor}).findings() == ()


def test_missing_gradients_are_reported_only_after_a_backward_pass(backend, digits):
    model = mlp()
    model[0].requires_grad_(False)
    assert summarize(model).findings() == ()
    (summary,) = train(model, digits, 1)
    assert summary.findings() == (), "frozen parameters need no gradient"


def test_the_time_is_linear_in_the_number_of_tensors(monkeypatch):
    """Every rule visits each tensor a fixed number of times."""
    visited = 0

    class Counted(list):
        def __iter__(self):
            nonlocal visited
            visited += len(self)
            return super().__iter__()

    monkeypatch.setattr(rules, "entries", lambda record: Counted(entries(record)))
    source = {str(i): torch.randn(2, 2, requires_grad=True) for i in range(300)}
    sum(map(torch.sum, source.values())).backward()
    find(record_of(summarize(source)), Thresholds())
    assert 0 < visited <= 20 * len(source)


# ---- models with problems


def test_learning_rate_that_is_much_too_high(digits):
    model = mlp()
    summaries = train(model, digits, 12, torch.optim.SGD(model.parameters(), lr=1e3))
    codes = [set(found(summary)) for summary in summaries]
    assert codes[0] == set() and FindingCode.GRADIENT_RATIO in codes[2]
    assert FindingCode.ZERO_GRADIENT in codes[-1], "its ReLUs are dead"


def detached() -> nn.Module:
    return Layer(
        lambda self, x: self.second(torch.relu(self.first(x)).detach()),
        first=nn.Linear(64, 32),
        second=nn.Linear(32, 10),
    )


def dead_relus() -> nn.Module:
    model = mlp()
    nn.init.constant_(model[2].bias, -100.0)
    return model


def root_of_zero() -> nn.Module:
    model = mlp()
    model[1] = Layer(lambda self, x: torch.sqrt(x * (x > 0)))  # its slope at 0 is infinite
    return model


@pytest.mark.parametrize(
    ("build", "code", "names", "advice"),
    [
        (detached, "no gradient", ["first.weight", "first.bias"], "loss: detached, unused"),
        (dead_relus, "zero gradient", ["0.weight", "2.weight", "4.weight"], "for dead ReLUs"),
        (root_of_zero, "NaN or Inf in gradient", ["0.bias", "0.weight"], "NaN/Inf after '0.bias'"),
    ],
)
def test_problem_in_the_first_backward_pass(backend, digits, build, code, names, advice):
    (summary,) = train(build(), digits, 1)
    assert found(summary) == {FindingCode(code): names}
    assert advice in summary.findings()[0].advice


def test_all_weights_initialized_to_zero(backend, digits):
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    weights = ["0.weight", "2.weight", "4.weight"]
    assert found(summarize(model)) == {FindingCode.ZERO_WEIGHT: weights}, "before training"
    summary = train(model, digits, 3)[-1]
    assert found(summary) == {FindingCode.ZERO_GRADIENT: weights, FindingCode.ZERO_WEIGHT: weights}
    names = {f.name for f in summary.findings() if f.severity == Severity.INFO}
    assert names == {"0.bias", "2.bias"}


def test_zero_weight_with_a_gradient_is_only_information(backend, digits):
    model = mlp()
    nn.init.zeros_(model[4].weight)
    assert found(summarize(model)) == {}
    first, second = train(model, digits, 2)
    assert found(first) == {}
    assert found(first, Severity.INFO) == {
        FindingCode.ZERO_WEIGHT: ["4.weight"],
        FindingCode.ZERO_GRADIENT: ["0.weight", "0.bias", "2.weight", "2.bias"],
    }
    assert second.findings() == ()


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
    assert set(found(near)) == {FindingCode.OVERFLOW, FindingCode.GRADIENT_RATIO}
    assert any("maximum of float16 6.550e+04" in f.message for f in near.findings())
    (overflown,) = (f for f in over.findings() if f.code == FindingCode.NONFINITE_GRADIENT)
    assert overflown.message.endswith("Inf of 10 elements") and overflown.name == "4.bias"
    assert "65,504, the maximum of float16" in overflown.advice


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
    assert "A gradient scaler causes this occasionally" in finding.advice


def test_deep_network_of_sigmoids_has_vanishing_gradients(digits):
    torch.manual_seed(0)
    layers = [layer for _ in range(30) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
    (summary,) = train(nn.Sequential(*layers, nn.Linear(64, 10)), digits, 1)
    norms = [summary[f"{2 * i}.weight"].grad.norm for i in range(31)]
    median = sorted(norms)[15]
    vanished = [f"{2 * i}.weight" for i in range(31) if norms[i] < 1e-6 * median]
    codes = found(summary, Severity.INFO)
    assert codes[FindingCode.VANISHING_GRADIENT] == vanished
    assert vanished and vanished[0] == "0.weight"
    assert FindingCode.EXPLODING_GRADIENT not in codes, "the last layers are healthy"


def test_input_in_the_wrong_unit_has_exploding_gradients(digits):
    """Pixels are a million times larger and the first weight a million times smaller."""
    images, labels = digits
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e-6
    (summary,) = train(model, (images * 1e6, labels), 1)
    assert found(summary)[FindingCode.EXPLODING_GRADIENT] == ["0.weight"]
    (finding,) = (f for f in summary.findings() if f.code == FindingCode.EXPLODING_GRADIENT)
    norms = [summary[f"{i}.weight"].grad.norm for i in (0, 2, 4)]
    assert finding.value == pytest.approx(norms[0] / sorted(norms)[1], rel=1e-12)
    assert finding.value > finding.threshold == 1e4


def test_summed_loss_has_gradients_larger_than_the_weights(digits):
    summary = one_step(digits, torch.float32, 1e4, reduction="sum")
    assert set(found(summary)) == {FindingCode.GRADIENT_RATIO}
    (finding, *_) = summary.findings()
    entry = summary[finding.name]
    assert finding.value == pytest.approx(entry.grad.norm / entry.norm, rel=1e-12)
    assert finding.value > finding.threshold == 1e3


def test_diverged_weights(digits):
    torch.manual_seed(0)
    model = transformer()
    train(model, digits, 4, torch.optim.SGD(model.parameters(), lr=1e6))
    huge = found(summarize(model))[FindingCode.HUGE_WEIGHT]
    assert huge
    assert huge == [
        name for name, p in model.named_parameters()
        if sum(n > 1 for n in p.shape) > 1 and p.double().square().mean().sqrt() > 1e3
    ]  # fmt: skip


def test_pruned_weight_is_only_information(backend):
    from torch.nn.utils import prune

    model = mlp()
    prune.random_unstructured(model[2], "weight", amount=0.95)
    prune.remove(model[2], "weight")
    (finding,) = summarize(model).findings()
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
        (({"zzz": 0.5},), {}, "got 'zzz'; use one of exploding_gradient, vanishing_gradient, "),
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
    assert finding == summarize(model).findings()[0] and len({finding, finding}) == 1


def test_findings_with_different_advice_are_listed_apart():
    lora = nn.Parameter(torch.zeros(4, 4))
    lora.grad = torch.ones(4, 4)
    frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    report = str(summarize({"frozen": frozen, "lora_B": lora}).findings())
    assert report.count("zero weight:") == 2
