"""The health check: each kind provoked in a real training, quiet in healthy ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from paramstats import ParamStats, Severity, Summary, Thresholds, summarize
from paramstats._findings import FindingCode
from paramstats._findings.rules import find

STEPS = 200


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For networks this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images of 64 numbers in [0, 1], and what they show."""
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
    """A summary after each backward."""
    images, labels = digits
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    dtype = next(model.parameters()).dtype
    summaries = []
    for step in range(steps):
        batch = torch.randint(0, len(images), (64,))
        chosen = images[batch].to(dtype)
        at_step(step, chosen)
        optimizer.zero_grad()
        loss_of(model(chosen), labels[batch]).backward()
        summaries.append(summarize(model))
        optimizer.step()
    return summaries


def kinds(summary: Summary, severity: Severity = Severity.WARNING) -> dict[FindingCode, list[str]]:
    """The names of each kind of finding."""
    out: dict[FindingCode, list[str]] = {}
    for finding in summary.findings().at_least(severity):
        out.setdefault(finding.code, []).append(finding.name)
    return out


# ---- healthy models


class Images(nn.Module):
    """Gives vectors of 64 to a network of images or sequences."""

    def __init__(self, network: nn.Module, *shape: int) -> None:
        super().__init__()
        self.network = network
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.view(-1, *self.shape))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def convolutional() -> nn.Module:
    def layer(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    last = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10)]
    return Images(nn.Sequential(*layer(1, 8), *layer(8, 16), *last), 1, 8, 8)


class Transformer(nn.Module):
    """BERT's encoder over the images' pixels as words."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=17,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            num_labels=10,
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(input_ids=(x * 16).long()).logits


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "build",
    [mlp, convolutional, lambda: Images(Recurrent(), 8, 8), Transformer],
    ids=["perceptron", "convolutional", "recurrent", "transformer"],
)
def test_no_alarm_in_healthy_trainings(digits, build, kind):
    torch.manual_seed(0)
    model = build()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3)
        if kind == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    )
    alarms = [
        f"step {step}: {finding}"
        for step, summary in enumerate(train(model, digits, STEPS, optimizer))
        for finding in summary.findings().at_least(Severity.WARNING)
    ]
    assert alarms == []
    assert summarize(build()).findings() == (), "a fresh one"
    assert summarize(model.state_dict()).findings().at_least(Severity.WARNING) == ()


class LowRank(nn.Module):
    """A frozen layer and what LoRA adds to it: B begins at zero, so that A has no gradient."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(4, inner.in_features) / 8)
        self.lora_b = nn.Parameter(torch.zeros(inner.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.lora_a.T @ self.lora_b.T


class Residual(nn.Module):
    """Its branch begins at zero: the last normalisation's weight does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(torch.relu(self.first(x))))


class Additive(nn.Module):
    """A normalisation over two dimensions, and a table of positions that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 8, 8))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(8, 8))
        self.norm = nn.LayerNorm((8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 8, 8) + self.pos_embed + self.relative_position_bias_table
        return self.norm(x).flatten(1)


@pytest.mark.parametrize(
    "first",
    [
        lambda: LowRank(nn.Linear(64, 64)),
        Residual,
        Additive,
        lambda: nn.Embedding(17, 1, padding_idx=0),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
    ],
    ids=["low rank", "zero residual", "additive", "padding", "weight norm"],
)
def test_no_alarm_from_what_begins_at_zero_or_one(backend, digits, first):
    torch.manual_seed(0)
    layer = first()
    images, labels = digits
    if isinstance(layer, nn.Embedding):
        images = images * 16
        layer = nn.Sequential(Indices(), layer, nn.Flatten())
    model = nn.Sequential(layer, nn.Linear(64, 10))
    assert summarize(model).findings().at_least(Severity.WARNING) == (), "a fresh one"
    for summary in train(model, (images, labels), 20):
        assert summary.findings().at_least(Severity.WARNING) == ()


class Indices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


def test_a_state_dict_of_ten_thousand_takes_no_longer_than_a_model(backend):
    """Each entry is looked at a fixed number of times: what is known of all is found once."""
    looked = 0

    class Entry(ParamStats):
        @property
        def requires_grad(self) -> bool:
            nonlocal looked
            looked += 1
            return super().requires_grad

    summary = summarize({str(i): torch.randn(2, 2) for i in range(300)})
    entries = {name: Entry(e._state, 1.0, e._layout, e._row, None) for name, e in summary.items()}
    find(Values(summary, entries), Thresholds())
    assert 0 < looked <= 3 * len(entries)


class Values:
    """A summary whose entries are others."""

    def __init__(self, summary: Summary, entries: dict[str, ParamStats]) -> None:
        self.diverged, self._grad_scale, self.values = {}, 1.0, entries.values


# ---- sick ones


def test_a_learning_rate_of_a_thousand(backend, digits):
    model = mlp()
    summaries = train(model, digits, 12, torch.optim.SGD(model.parameters(), lr=1e3))
    named = [set(kinds(summary)) for summary in summaries]
    assert named[0] == set() and FindingCode.GRADIENT_RATIO in named[2]
    assert FindingCode.ZERO_GRADIENT in named[-1], "its ReLUs have died"


def test_a_detached_layer(backend, digits):
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)).detach())

    (summary,) = train(Detached(), digits, 1)
    assert kinds(summary) == {FindingCode.MISSING_GRADIENT: ["first.weight", "first.bias"]}
    assert "detached" in summary.findings()[0].advice


def test_no_gradient_is_no_finding_before_the_first_backward(backend):
    assert summarize(mlp()).findings() == ()


def test_frozen_layers_owe_no_gradient(backend, digits):
    model = mlp()
    model[0].requires_grad_(False)
    (summary,) = train(model, digits, 1)
    assert summary.findings() == ()


def test_zero_initialisation(backend, digits):
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    weights = ["0.weight", "2.weight", "4.weight"]
    assert kinds(summarize(model)) == {FindingCode.DEAD_WEIGHT: weights}, "before training"
    summary = train(model, digits, 3)[-1]
    assert kinds(summary) == {FindingCode.ZERO_GRADIENT: weights, FindingCode.DEAD_WEIGHT: weights}
    assert {f.name for f in summary.findings() if f.severity == Severity.INFO} == {
        "0.bias",
        "2.bias",
    }


def test_constant_initialisation(backend, digits):
    model = mlp()
    nn.init.constant_(model[2].weight, 0.01)
    summary = summarize(model)
    assert kinds(summary) == {FindingCode.CONSTANT_WEIGHT: ["2.weight"]}
    assert summary.findings()[0].message == "std 0, all elements 0.01"


def test_a_zero_that_wakes_up_is_only_good_to_know(backend, digits):
    model = mlp()
    nn.init.zeros_(model[4].weight)
    assert kinds(summarize(model)) == {}
    first, second = train(model, digits, 2)
    assert kinds(first) == {}
    assert kinds(first, Severity.INFO) == {
        FindingCode.DEAD_WEIGHT: ["4.weight"],
        FindingCode.ZERO_GRADIENT: ["0.weight", "0.bias", "2.weight", "2.bias"],
    }
    assert second.findings() == ()


def test_dead_relus(backend, digits):
    model = mlp()
    nn.init.constant_(model[2].bias, -100.0)
    summary = train(model, digits, 2)[-1]
    assert kinds(summary) == {FindingCode.ZERO_GRADIENT: ["0.weight", "2.weight", "4.weight"]}


def test_nan_in_the_data(backend, digits):
    def spoil(step: int, images: Tensor) -> None:
        if step == 1:
            images[5, 7] = math.nan

    before, during, after = train(mlp(), digits, 3, at_step=spoil)
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert before.findings() == ()
    assert kinds(during) == {FindingCode.NONFINITE_GRADIENT: names[::-1]}
    assert "loss and at the data" in during.findings()[0].advice
    assert kinds(after)[FindingCode.NONFINITE_PARAMETER] == names
    gradients = next(f for f in after.findings() if f.code == FindingCode.NONFINITE_GRADIENT)
    assert gradients.advice == "From parameters that have it: mend those first"
    first = after.findings()[0]
    assert first.name == "0.weight" and "The first of 6 in the model's order" in first.advice


def test_nan_made_in_backward_is_traced_to_where_it_began(backend, digits):
    class Root(nn.Module):
        """The root of exactly 0 has no finite slope."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x * (x > 0))

    model = mlp()
    model[1] = Root()
    (summary,) = train(model, digits, 1)
    assert kinds(summary) == {FindingCode.NONFINITE_GRADIENT: ["0.bias", "0.weight"]}
    assert "Backward met it here first" in summary.findings()[0].advice


def test_float16_that_overflows(backend, digits):

    def scaled(scale: float) -> Summary:
        def loss(out: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(out.float(), labels) * scale

        torch.manual_seed(1)
        return train(mlp(torch.float16), digits, 1, loss_of=loss)[0]

    largest = max(entry.grad.abs_max for entry in scaled(1).values())
    near, over = scaled(40000 / largest), scaled(80000 / largest)
    assert set(kinds(near)) == {FindingCode.OVERFLOW, FindingCode.GRADIENT_RATIO}
    assert any("float16 ends at 65.50e3" in f.message for f in near.findings())
    (sick,) = (f for f in over.findings() if f.code == FindingCode.NONFINITE_GRADIENT)
    assert sick.message.endswith("Inf of 10") and sick.name == "4.bias"
    assert "65,504, where float16 ends" in sick.advice


def test_float16_that_underflows(backend, digits):
    def small(out: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.float(), labels) * 1e-4

    (summary,) = train(mlp(torch.float16), digits, 1, loss_of=small)
    assert kinds(summary)[FindingCode.UNDERFLOW] == ["0.weight", "2.weight", "4.weight"]
    (wide,) = train(mlp(torch.bfloat16), digits, 1, loss_of=small)
    assert FindingCode.UNDERFLOW not in kinds(wide), "bfloat16 has float32's range"


def test_ranges_are_those_in_memory(backend):
    """What a scaler multiplied stays in the type as it is, whatever the statistics are."""
    w = torch.randn(4, 4).half().requires_grad_()
    w.grad = torch.full((4, 4), 32768.0, dtype=torch.float16)
    summary = summarize({"w": w}, grad_scale=32768.0)
    assert summary["w"].grad.mean == 1
    assert [f.code for f in summary.findings()] == [FindingCode.OVERFLOW]
    assert summary.findings()[0].value == pytest.approx(32768 / 65504)


def test_a_deep_network_of_sigmoids_has_vanishing_gradients(backend, digits):
    torch.manual_seed(0)
    layers = [layer for _ in range(30) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
    (summary,) = train(nn.Sequential(*layers, nn.Linear(64, 10)), digits, 1)
    found = kinds(summary, Severity.INFO)
    norms = [summary[f"{2 * i}.weight"].grad.norm for i in range(31)]
    median = sorted(norms)[15]
    vanished = [f"{2 * i}.weight" for i in range(31) if norms[i] < 1e-6 * median]
    assert found[FindingCode.VANISHING_GRADIENT] == vanished
    assert vanished and vanished[0] == "0.weight"
    assert FindingCode.EXPLODING_GRADIENT not in found, "the last layers are well"


def test_a_feature_in_units_of_its_own_has_exploding_gradients(backend, digits):
    """Pixels counted in millionths, before a weight that makes up for it."""
    images, labels = digits
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e-6
    (summary,) = train(model, (images * 1e6, labels), 1)
    assert kinds(summary)[FindingCode.EXPLODING_GRADIENT] == ["0.weight"]
    (finding,) = (f for f in summary.findings() if f.code == FindingCode.EXPLODING_GRADIENT)
    norms = [summary[f"{i}.weight"].grad.norm for i in (0, 2, 4)]
    assert finding.value == norms[0] / sorted(norms)[1] > finding.threshold == 1e4


def test_a_loss_that_is_a_sum_is_out_of_proportion(backend, digits):
    def total(out: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, labels, reduction="sum") * 1e4

    (summary,) = train(mlp(), digits, 1, loss_of=total)
    assert set(kinds(summary)) == {FindingCode.GRADIENT_RATIO}
    (finding, *_) = summary.findings()
    entry = summary[finding.name]
    assert finding.value == entry.grad.norm / entry.norm > finding.threshold == 1e3


def test_weights_that_have_run_away(backend, digits):
    torch.manual_seed(0)
    model = Transformer()
    train(model, digits, 4, torch.optim.SGD(model.parameters(), lr=1e6))
    huge = kinds(summarize(model))[FindingCode.HUGE_WEIGHT]
    assert huge == [
        name for name, p in model.named_parameters()
        if sum(n > 1 for n in p.shape) > 1 and p.double().square().mean().sqrt() > 1e3
    ]  # fmt: skip
    assert huge


def test_pruned_weights_are_good_to_know(backend):
    from torch.nn.utils import prune

    model = mlp()
    prune.random_unstructured(model[2], "weight", amount=0.95)
    prune.remove(model[2], "weight")
    (finding,) = summarize(model).findings()
    assert (finding.code, finding.severity) == (FindingCode.SPARSE_WEIGHT, Severity.INFO)
    assert finding.name == "2.weight" and finding.value == pytest.approx(0.95, abs=1e-3)
    assert summarize(model).findings(Thresholds(sparse_weight=0.97)) == ()


def test_masks_in_buffers_may_be_infinite(backend):
    model = nn.Module()
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    assert summarize(model, buffers=True).findings() == ()
    model.mask[0, 0] = math.nan
    (finding,) = summarize(model, buffers=True).findings()
    assert (finding.source, finding.name, finding.value) == ("buffer", "mask", 1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8),  # a fresh bias
        torch.ones(8),  # a fresh normalisation
        torch.zeros(1, 1, 8),  # a fresh class token
        torch.zeros(4, 4, dtype=torch.int64),  # counters
        torch.ones(4, 4, dtype=torch.bool),
        torch.empty(0, 4),
        torch.empty(4, 4, device="meta"),
        torch.tensor(0.0),
    ],
)
def test_what_is_no_weight_may_be_constant(backend, tensor):
    assert summarize({"x": tensor}).findings() == ()


def test_lazy_parameters_are_no_finding(backend):
    assert summarize(nn.Sequential(nn.LazyLinear(4))).findings() == ()


def test_copies_that_differ(backend):
    make, state = summarize({"w": torch.randn(3, 4)}).__reduce__()
    summary = make(*state[:6], {"w (gradient)": "ranks 1 and 3 differ"}, False)
    (finding,) = summary.findings()
    assert (finding.code, finding.severity) == (FindingCode.DIVERGED_COPIES, Severity.ERROR)
    assert (finding.name, finding.source) == ("w", "grad")
    assert finding.message == "ranks 1 and 3 differ" and "! copies differ" in summary.table()


# ---- what a finding is


def test_limits_are_adjustable_and_exact(backend):
    w = torch.ones(2, 8, requires_grad=True)
    with torch.no_grad():
        w[0, 0] = 0.5
    w.grad = torch.full((2, 8), 10.0)
    summary = summarize({"w": w})
    ratio = summary["w"].grad.norm / summary["w"].norm
    assert summary.findings(Thresholds(largest_gradient_ratio=ratio)) == ()
    below = math.nextafter(ratio, 0)
    (finding,) = summary.findings(Thresholds(largest_gradient_ratio=below))
    assert finding.value == ratio and finding.threshold == below


@pytest.mark.parametrize("value", [-1.0, math.nan, "1", None])
def test_thresholds_are_numbers(value):
    with pytest.raises(ValueError, match="expected a number of 0 or more for overflow, got "):
        Thresholds(overflow=value)


def test_the_most_severe_comes_first(backend, model):
    model[0].weight.grad.zero_()
    model[0].bias.grad.zero_()
    model[2].weight.data[0, 0] = math.inf
    findings = summarize(model).findings()
    assert [f.severity for f in findings] == sorted((f.severity for f in findings), reverse=True)
    assert [f.name for f in findings] == ["2.weight", "0.weight", "0.bias"]
    assert findings.at_least(Severity.ERROR) == findings[:1]
    with pytest.raises(TypeError, match=r"a paramstats\.Severity, got 'error'"):
        findings.at_least("error")


def test_they_print_as_a_report(backend):
    source = {f"w{i}": torch.zeros(3, 4) for i in range(25)} | {"sick": torch.tensor([math.nan])}
    lines = str(summarize(source).findings()).splitlines()
    assert lines[0].startswith("ERROR NaN or Inf in parameter: ")
    assert lines[1] == "    sick  1 NaN of 1"
    assert lines[2].startswith("WARNING dead weight: ")
    assert lines[3] == "    w0  all 12 elements zero" and lines[-1] == "    ... and 15 more"
    assert len(lines) == 14
    assert str(summarize({"w": torch.randn(3, 4)}).findings()) == "no findings"


def test_a_finding_is_data(backend, model):
    model[0].weight.grad.zero_()
    (finding,) = summarize(model).findings()
    record = {**vars(finding), "severity": finding.severity.name}
    assert json.loads(json.dumps(record))["kind"] == "zero gradient"
    assert str(finding).startswith("WARNING 0.weight: zero gradient: all 48 elements. ")
    assert finding == summarize(model).findings()[0] and len({finding, finding}) == 1
