"""The health check of optimizers: it names sick updates, and is silent about healthy ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import paramstats
from paramstats import FindingCode, Severity, Summary, summarize
from tests.findings_models import (
    convolutional,
    digits,
    embedding,
    found,
    lora,
    mlp,
    one_thread,
    recurrent,
    transformer,
    zero_positions,
    zero_residual,
)

__all__ = ["digits", "one_thread"]  # fixtures

CODES = {
    FindingCode.LARGE_UPDATE,
    FindingCode.LOST_UPDATE,
    FindingCode.FORGOTTEN_PARAMETER,
    FindingCode.LAGGING_VARIANCE,
    FindingCode.BELOW_EPS,
}
WEIGHTS = ["0.weight", "2.weight", "4.weight"]  # of `mlp`
adamw = torch.optim.AdamW


def train(
    model: nn.Module,
    digits: tuple[Tensor, Tensor],
    steps: int,
    optimizer: torch.optim.Optimizer,
    scale_of: Callable[[int], float] = lambda step: 1.0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    every: int = 1,
    update: str = "auto",
) -> list[Summary]:
    """Train and return the latest summary after each step.

    `scale_of` returns the factor of the loss of a step.
    """
    images, labels = digits
    dtype = next(model.parameters()).dtype
    summaries: list[Summary] = []
    watcher = paramstats.watch(
        model, lambda *_: None, every=every, optimizer=optimizer, update=update
    )
    torch.manual_seed(0)
    for step in range(steps):
        rows = torch.randint(0, len(images), (64,))
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows].to(dtype)).float(), labels[rows])
        (loss * scale_of(step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        assert watcher.summary is not None
        summaries.append(watcher.summary)
    watcher.close()
    return summaries


def warnings_of(summaries: list[Summary]) -> list[str]:
    return [
        f"step {step}: {finding}"
        for step, summary in enumerate(summaries)
        for finding in summary.findings().at_least(Severity.WARNING)
    ]


def codes(summary: Summary) -> set[FindingCode]:
    """Return the codes of the checks of optimizers, of every severity."""
    return CODES & set(found(summary, Severity.INFO))


def first(summary: Summary, code: FindingCode) -> paramstats.Finding:
    return next(finding for finding in summary.findings() if finding.code == code)


class Own(torch.optim.Optimizer):
    """AdamW without weight decay for bfloat16; `write(p, state, change)` changes a parameter."""

    def __init__(self, params: object, lr: float, write: Callable[..., None]) -> None:
        super().__init__(params, {"lr": lr})
        self.write = write

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                zeros = torch.zeros_like(p, dtype=torch.float32)
                state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
            state["step"] += 1
            grad, t = p.grad.float(), state["step"]
            m, v = state["exp_avg"].lerp_(grad, 0.1), state["exp_avg_sq"].lerp_(grad**2, 1e-3)
            root = (v / (1 - 0.999**t)).sqrt()
            self.write(p, state, self.param_groups[0]["lr"] * m / (1 - 0.9**t) / (root + 1e-8))


def with_master_weights(p: Tensor, state: dict[str, Tensor], change: Tensor) -> None:
    state.setdefault("fp32", p.float()).sub_(change)
    p.copy_(state["fp32"])


def with_kahan_summation(p: Tensor, state: dict[str, Tensor], change: Tensor) -> None:
    rest = state.setdefault("kahan_comp", torch.zeros_like(p)).sub_(change)
    old = p.clone()
    p.add_(rest)
    rest.add_(old - p)


def with_stochastic_rounding(p: Tensor, state: dict[str, Tensor], change: Tensor) -> None:
    bits = (p.float() - change).view(torch.int32)
    bits += torch.randint(0, 1 << 16, p.shape, dtype=torch.int32)
    p.copy_((bits & -65536).view(torch.float32))


def round_to_nearest(p: Tensor, state: dict[str, Tensor], change: Tensor) -> None:
    p.sub_(change)


# ---- healthy trainings


@pytest.mark.parametrize(
    "optimizer_of",
    [
        functools.partial(adamw, lr=1e-3),
        functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    ],
    ids=["adamw", "adam", "sgd"],
)
@pytest.mark.parametrize("build", [mlp, convolutional, recurrent, transformer])
def test_healthy_updates_have_no_warnings(digits, build, optimizer_of):
    torch.manual_seed(0)
    model = build()
    assert warnings_of(train(model, digits, 60, optimizer_of(model.parameters()))) == []


@pytest.mark.parametrize("build", [mlp, convolutional, recurrent, transformer])
def test_bfloat16_at_a_usual_learning_rate_has_no_warnings(digits, build):
    torch.manual_seed(0)
    model = build().bfloat16()
    summaries = train(model, digits, 60, adamw(model.parameters(), lr=1e-3))
    assert warnings_of(summaries) == []
    lost = [summary.total.update.zero_fraction for summary in summaries]
    assert max(lost) > 0.05, "some updates are lost"


@pytest.mark.parametrize(
    "write", [with_master_weights, with_kahan_summation, with_stochastic_rounding]
)
def test_optimizers_that_keep_small_updates_lose_none(digits, write):
    torch.manual_seed(0)
    model = mlp(torch.bfloat16)
    summaries = train(model, digits, 20, Own(model.parameters(), 1e-5, write))
    assert min(summary["2.weight"].update.zero_fraction for summary in summaries) > 0.9
    assert not any(map(codes, summaries))
    model = mlp(torch.bfloat16)
    summary = train(model, digits, 20, Own(model.parameters(), 1e-5, round_to_nearest))[-1]
    assert found(summary)[FindingCode.LOST_UPDATE] == WEIGHTS


@pytest.mark.parametrize("layer", [lora, zero_residual, zero_positions, embedding])
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_updates_of_weights_that_start_at_zero_are_healthy(backend, digits, layer, lr):
    """After the step, gradients are still zero that zero weights had blocked before it."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.Linear(64, 10))
    summaries = train(model, digits, 12, adamw(model.parameters(), lr=lr))
    assert warnings_of(summaries) == []


def test_elements_without_a_gradient_are_not_lost(digits):
    """Such as the rows of an embedding whose tokens did not occur, and pruned weights."""
    torch.manual_seed(0)
    model = mlp(torch.bfloat16)
    mask = torch.rand(64, 64) < 0.05
    model[0].weight.register_hook(lambda grad: grad * mask)
    summaries = train(model, digits, 5, torch.optim.SGD(model.parameters(), lr=0.5))
    assert min(summary["0.weight"].update.zero_fraction for summary in summaries) > 0.9
    assert not any(map(codes, summaries))


def test_steps_with_a_learning_rate_of_zero_are_healthy(digits):
    """Warm-up begins with it."""
    model = mlp()
    optimizer = adamw(model.parameters(), lr=1e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    summaries = train(model, digits, 5, optimizer, scheduler=warmup)
    assert summaries[0]["0.weight"].update.zero_fraction == 1
    assert not any(map(codes, summaries))


def test_lbfgs_makes_several_steps_in_one(digits):
    model, (images, labels) = mlp(), digits
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    watcher = paramstats.watch(model, lambda *_: None, every=1, optimizer=optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert watcher.summary["0.weight"].update_ratio > 0.25
    assert codes(watcher.summary) == set()


def test_ratio_rules_are_silent_where_the_update_is_known(backend, digits):
    """Adam makes good updates of gradients that are much larger or smaller than the weight."""
    model = mlp()
    (summary,) = train(model, digits, 1, adamw(model.parameters(), lr=1e-3), lambda _: 1e6)
    assert FindingCode.GRADIENT_RATIO not in found(summary, Severity.INFO)
    assert FindingCode.GRADIENT_RATIO in found(summarize(model), Severity.INFO)
    small = {"smallest_gradient_ratio": 1e9, "largest_gradient_ratio": 1e10}
    assert summary.findings(**small) == () and len(summarize(model).findings(**small)) == 3


# ---- sick trainings


@pytest.mark.parametrize("lr", [0.1, 1.0])
@pytest.mark.parametrize("build", [mlp, convolutional, transformer])
def test_adamw_with_a_learning_rate_that_is_too_high(digits, build, lr):
    """It is found at every step, also when the weights have grown with the updates."""
    torch.manual_seed(0)
    model = build()
    summaries = train(model, digits, 40, adamw(model.parameters(), lr=lr))
    for summary in summaries:
        names = found(summary)[FindingCode.LARGE_UPDATE]
        weights = [e for e in summary.values() if len(e.shape) - e.shape.count(1) > 1]
        assert 2 * len(names) > len(weights)
    for summary in (summaries[0], summaries[-1]):
        finding = first(summary, FindingCode.LARGE_UPDATE)
        assert f"lr {lr:g}" in finding.message and finding.value > finding.threshold == 0.25
        assert finding.source == "update" and "Lower the learning rate" in finding.advice


def test_sgd_with_a_learning_rate_that_is_too_high(backend, digits):
    model = mlp()
    one, two = train(model, digits, 2, torch.optim.SGD(model.parameters(), lr=100.0))
    assert found(one)[FindingCode.LARGE_UPDATE] == WEIGHTS
    finding = first(two, FindingCode.LARGE_UPDATE)
    assert finding.value == pytest.approx(two[finding.name].update_ratio, rel=1e-12)
    assert finding.message.endswith("times that of the weight, lr 100")


def test_layer_that_is_missing_in_the_optimizer(backend, digits):
    model = mlp()
    others = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    (summary,) = train(model, digits, 1, adamw(others, lr=1e-3))
    assert found(summary) == {FindingCode.FORGOTTEN_PARAMETER: ["2.weight", "2.bias"]}
    assert "Add it to the optimizer" in summary.findings()[0].advice
    assert summary.filter(include=r"^2\.").findings() == (), "nothing to compare with"
    model[2].requires_grad_(False)
    assert summarize(model, optimizer=adamw(others, lr=1e-3)).findings() == ()


def test_two_optimizers_forget_nothing(digits):
    model = mlp()
    one = adamw(model[0].parameters(), lr=1e-3)
    two = adamw(model[2:].parameters(), lr=1e-3)
    train(model, digits, 1, one)
    two.step()
    assert warnings_of([summarize(model, optimizer=[one, two])]) == []


def test_training_only_the_last_layer_is_information(digits):
    model = mlp()
    (summary,) = train(model, digits, 1, adamw(model[4].parameters(), lr=1e-3))
    assert found(summary) == {}
    names = found(summary, Severity.INFO)[FindingCode.FORGOTTEN_PARAMETER]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("update", ["formula", "copy"])
@pytest.mark.parametrize("build", [mlp, convolutional, recurrent, transformer])
def test_bfloat16_updates_that_rounding_removes(digits, build, update):
    torch.manual_seed(0)
    model = build().bfloat16()
    optimizer = adamw(model.parameters(), lr=1e-5)
    summary = train(model, digits, 12, optimizer, update=update)[-1]
    assert FindingCode.LOST_UPDATE in found(summary)
    finding = first(summary, FindingCode.LOST_UPDATE)
    assert "bfloat16, lr 1.000e-05" in finding.message and "master weights" in finding.advice
    entry = summary[finding.name]
    zeros = entry.grad.zero_fraction
    lost = (entry.update.zero_fraction - zeros) / (1 - zeros)
    assert finding.value == pytest.approx(lost) and finding.value > finding.threshold


def test_updates_that_a_scheduler_has_made_small_are_information(digits):
    model = mlp(torch.bfloat16)
    optimizer = adamw(model.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    last = train(model, digits, 5, optimizer, scheduler=decay)[-1]
    assert found(last) == {} and FindingCode.LOST_UPDATE in codes(last)
    finding = first(last, FindingCode.LOST_UPDATE)
    assert finding.advice.startswith("The scheduler has lowered the learning rate.")


def test_float32_updates_that_rounding_removes(backend, digits):
    model = mlp()
    (summary,) = train(model, digits, 1, torch.optim.SGD(model.parameters(), lr=1e-9))
    assert found(summary) == {FindingCode.LOST_UPDATE: WEIGHTS}
    assert "Raise the learning rate" in summary.findings()[0].advice


def test_updates_of_one_weight_that_rounding_removes_are_information(digits):
    """It may have converged, or its gradients may be small for another reason."""
    model = mlp()
    slow = {"params": [model[2].weight], "lr": 1e-9}
    others = [p for p in model.parameters() if p is not model[2].weight]
    optimizer = torch.optim.SGD([slow, {"params": others}], lr=0.05)
    (summary,) = train(model, digits, 1, optimizer)
    assert found(summary) == {}
    assert found(summary, Severity.INFO) == {FindingCode.LOST_UPDATE: ["2.weight"]}


def test_gradients_that_outgrow_the_second_moment(backend, digits):
    model, last = mlp(), 200
    optimizer = adamw(model.parameters(), lr=1e-3)

    def scale_of(step: int) -> float:
        return 1000.0 if step == last else 1.0

    summaries = train(model, digits, last + 1, optimizer, scale_of, every=last)
    before, during = summaries[-2:]
    assert codes(before) == set() and codes(during) == {FindingCode.LAGGING_VARIANCE}
    finding = first(during, FindingCode.LAGGING_VARIANCE)
    rms = during[finding.name].optimizer.rms
    assert finding.value == pytest.approx(rms) and rms > 10
    assert (finding.source, finding.severity) == ("grad", Severity.INFO)


def test_gradients_below_eps(backend, digits):
    """Behind eight sigmoids they vanish, which Adam does not repair."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    summary = train(model, digits, 5, adamw(model.parameters(), lr=1e-3))[-1]
    names = found(summary, Severity.INFO)[FindingCode.BELOW_EPS]
    assert names == ["0.weight", "2.weight"]
    finding = first(summary, FindingCode.BELOW_EPS)
    state = summary[finding.name].optimizer
    never = state.state["exp_avg_sq"].zero_fraction
    assert finding.value == pytest.approx((state.eps_fraction - never) / (1 - never))
    assert "below eps 1.000e-08" in finding.message


def test_elements_that_never_had_a_gradient_are_not_below_eps(digits):
    model = nn.Sequential(embedding(), nn.Linear(64, 10))
    model[0].embedding = nn.Embedding(1000, 2)
    model[1] = nn.Linear(128, 10)
    summary = train(model, digits, 3, adamw(model.parameters(), lr=1e-3))[-1]
    assert summary["0.embedding.weight"].optimizer.eps_fraction > 0.9
    assert codes(summary) == set()


def test_updates_that_are_not_finite_are_no_large_updates(backend, digits):
    model = mlp()
    optimizer = adamw(model.parameters(), lr=1e-3)
    (summary,) = train(model, digits, 1, optimizer, lambda _: math.nan)
    assert codes(summary) == set()
    assert FindingCode.NONFINITE_PARAMETER in found(summary)
