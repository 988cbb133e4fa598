"""The health check: parameters that get no gradient, or one of zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paramstats import FindingCode, Severity, Summary, summarize
from tests.findings_models import Layer, digits, found, mlp, one_thread, train

__all__ = ["digits", "one_thread"]  # fixtures


def test_missing_gradients_are_reported_only_after_a_backward_pass(backend, digits):
    model = mlp()
    model[0].requires_grad_(False)
    (finding,) = summarize(model).findings()
    assert (finding.name, finding.severity) == ("", Severity.INFO)
    assert finding.message == "none of 4 parameters that require a gradient has one"
    (summary,) = train(model, digits, 1)
    assert summary.findings() == (), "frozen parameters need no gradient"


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
        (
            detached,
            "no gradient",
            ["first.weight", "first.bias"],
            "before 'second.weight' gets a gradient",
        ),
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


# ---- parameters that may have no gradient


def names_of(summary: Summary, code: FindingCode) -> set[str]:
    return {finding.name for finding in summary.findings() if finding.code == code}


def advice_of(summary: Summary, name: str) -> str:
    (finding,) = (finding for finding in summary.findings() if finding.name == name)
    return finding.advice


def block() -> nn.Module:
    return Layer(
        lambda self, x: x + self.second(torch.relu(self.first(x))),
        first=nn.Linear(64, 64),
        second=nn.Linear(64, 64),
    )


def residual(call: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.ModuleList([block() for _ in range(4)])
    return Layer(call, stem=nn.Linear(64, 64), blocks=blocks, head=nn.Linear(64, 10))


@pytest.mark.parametrize("skipped", [0, 2])
def test_block_that_stochastic_depth_skips(backend, digits, skipped):
    def call(self: nn.Module, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, module in enumerate(self.blocks):
            x = x if i == skipped else module(x)
        return self.head(x)

    (summary,) = train(residual(call), digits, 1)
    assert found(summary) == {}
    name = f"blocks.{skipped}.first.weight"
    assert name in names_of(summary, FindingCode.MISSING_GRADIENT)
    assert "stochastic depth" in advice_of(summary, name)


def test_gradient_of_zeros_of_a_skipped_block(digits):
    def call(self: nn.Module, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, module in enumerate(self.blocks):
            x = x + (module(x) - x) * (i != 2)
        return self.head(x)

    (summary,) = train(residual(call), digits, 1)
    assert found(summary) == {}
    assert "blocks.2.first.weight" in names_of(summary, FindingCode.ZERO_GRADIENT)


def test_detached_states_between_blocks(backend, digits):
    """All before the cut is a warning, also blocks of which others have a gradient."""

    def call(self: nn.Module, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, module in enumerate(self.blocks):
            x = module(x.detach() if i == 2 else x)
        return self.head(x)

    (summary,) = train(residual(call), digits, 1)
    parts = ("stem", *(f"blocks.{i}.{part}" for i in (0, 1) for part in ("first", "second")))
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert found(summary) == {FindingCode.MISSING_GRADIENT: names}
    assert "'blocks.2.first.weight'" in advice_of(summary, "stem.weight")


@pytest.mark.parametrize("first", ["target", "online"])
def test_target_network_has_no_gradient(backend, digits, first):
    second = {"target": "online", "online": "target"}[first]
    model = Layer(lambda self, x: self.online(x), **{first: mlp(), second: mlp()})
    (summary,) = train(model, digits, 1)
    assert found(summary) == {}
    assert "target network" in advice_of(summary, "target.0.weight")


def test_pooler_and_mask_token_that_are_not_used(backend, digits):
    model = Layer(
        lambda self, x: self.head(self.encoder(x)),
        mask_token=nn.Parameter(torch.zeros(1, 1, 64)),
        encoder=nn.Linear(64, 64),
        pooler=nn.Linear(64, 64),
        head=nn.Linear(64, 10),
    )
    (summary,) = train(model, digits, 1)
    assert found(summary) == {}
    names = {"mask_token", "pooler.weight", "pooler.bias"}
    assert names_of(summary, FindingCode.MISSING_GRADIENT) == names


def test_parameters_that_no_optimizer_has_need_no_gradient(digits):
    """The generator while the discriminator is trained."""
    images, _ = digits
    model = Layer(lambda self, x: self.d(self.g(x).detach()), g=mlp(), d=nn.Linear(10, 1))
    for trained, codes in ((model.d, set()), (model, {FindingCode.MISSING_GRADIENT})):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        model(images[:8]).mean().backward()
        optimizer.step()
        assert set(found(summarize(model, optimizer=optimizer))) == codes


def test_loss_that_has_reached_its_margin(backend, digits):
    (summary,) = train(mlp(), digits, 1, loss_of=lambda out, labels: torch.relu(out - 1e3).mean())
    (finding,) = summary.findings()
    assert (finding.name, finding.code) == ("", FindingCode.ZERO_GRADIENT)
    assert finding.severity == Severity.INFO and "margin" in finding.advice


def test_frozen_parameter_of_zeros_is_named(backend, digits):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight).requires_grad_(False)
    nn.init.ones_(model[1].bias)
    (summary,) = train(model, digits, 1)
    assert "'1.weight' is frozen at zero" in advice_of(summary, "0.weight")
    assert "'1.weight' is frozen at zero" in advice_of(summary, "0.bias")


def test_the_cause_of_zero_gradients_precedes_them(digits):
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    (summary,) = train(model, digits, 1)
    assert summary.findings()[0].code == FindingCode.ZERO_WEIGHT
