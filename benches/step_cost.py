"""What a look at parameters and gradients adds to a training step on the CPU, tool by tool.

    python -m benches.step_cost                    seven minutes
    python -m benches.step_cost --only resnet,mlp
    python -m benches.step_cost --json FILE        for benches.report

In every turn each tool takes part in its own steps of one and the same training, and is detached
again. The order is drawn anew for every turn, so that no tool always follows the same one, and one
step goes by before the timed ones. What a tool adds is told from the same turn's steps without a
tool, so that a slow spell of the machine hits both.

wandb runs offline in a temporary folder, and what it does in its own process after a turn is waited
for; Lightning's norms are left as the tensors that its function returns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramstats
from benches import hardware
from benches.contestants import from_scalars, item_loop_no_grad
from benches.exact import PARAMSTATS, TORCH, Figures, Tolerances, exact, worst_errors
from benches.models import tensors

Look = Callable[[], Any]
"""What a tool does between the backward pass and the optimizer's step."""

Attached = Callable[[nn.Module], AbstractContextManager[Look]]
"""Hooks, if it has any, stay on the model as long as the context lasts."""


# ---- the tools ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """One way to look at a training."""

    name: str
    title: str
    attached: Attached
    figures: Callable[[Any], dict[str, Figures]] | None = None
    """What a look returned, by `models.tensors`' names; None where it returns nothing to check."""
    tolerances: Tolerances = PARAMSTATS


def _called(
    look: Callable[[nn.Module], Any],
) -> Callable[[nn.Module], AbstractContextManager[Look]]:
    """A function of the model that has nothing to attach."""

    @contextmanager
    def attached(model: nn.Module) -> Iterator[Look]:
        yield lambda: look(model)

    return attached


@contextmanager
def _hooks(model: nn.Module) -> Iterator[Look]:
    """Each gradient is summarised as soon as it is accumulated, while it may still be in cache."""
    found: list[paramstats.Summary] = []

    def hook_of(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            assert p.grad is not None
            found.append(paramstats.summarize({name: p.grad}))

        return hook

    def collect() -> dict[str, float]:
        log: dict[str, float] = {}
        for summary in found:
            log.update(summary.scalars(_GRADIENT_KEY, totals=False))
        found.clear()
        return log

    with ExitStack() as stack:
        for name, p in model.named_parameters():
            stack.callback(p.register_post_accumulate_grad_hook(hook_of(name)).remove)
        yield collect


_GRADIENT_KEY = "grad_{stat}/{name}"


def _paramstats() -> list[Tool]:
    return [
        Tool(
            "paramstats",
            "paramstats",
            _called(lambda model: paramstats.summarize(model).scalars()),
            _without_total,
        ),
        Tool(
            "paramstats_gradients",
            "paramstats, gradients alone",
            _called(lambda model: paramstats.summarize(model, params=False).scalars()),
            _without_total,
        ),
        Tool("paramstats_hooks", "paramstats, from each gradient's hook", _hooks, from_scalars),
    ]


def _without_total(scalars: dict[str, float]) -> dict[str, Figures]:
    return from_scalars({key: x for key, x in scalars.items() if not key.endswith("/total")})


def _lightning(stack: ExitStack) -> Tool:
    grad_norm = importlib.import_module("lightning.pytorch.utilities").grad_norm

    def figures(norms: dict[str, torch.Tensor]) -> dict[str, Figures]:
        named = {key.partition("/")[2]: norm.item() for key, norm in norms.items() if "/" in key}
        return {f"{name}.grad": (None, None, norm, None) for name, norm in named.items()}

    return Tool(
        "lightning",
        "Lightning's `grad_norm`",
        _called(lambda model: grad_norm(model, norm_type=2)),
        figures,
        TORCH,
    )


def _wandb(stack: ExitStack) -> Tool:
    """Histograms of all parameters and gradients at every step, in one run for all models."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paramstats-wandb-"))
    for variable in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        os.environ[f"WANDB_{variable}"] = folder
    os.environ.update(
        WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB__DISABLE_STATS="true"
    )
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="paramstats", mode="offline")
    stack.callback(run.finish)

    @contextmanager
    def attached(model: nn.Module) -> Iterator[Look]:
        run.watch(model, log="all", log_freq=1, idx=0)
        try:
            yield lambda: run.log({"step": 1})
        finally:
            run.unwatch(model)

    return Tool("wandb_watch", '`wandb.watch(log="all")`', attached)


def tools(stack: ExitStack) -> tuple[list[Tool], dict[str, str]]:
    """All that can be tried here, "nothing" first; and why the others cannot."""
    found = [
        Tool("nothing", "nothing", _called(lambda model: None)),
        *_paramstats(),
        Tool(
            "item_loop", "`.item()` loop", _called(item_loop_no_grad), lambda log: log, TORCH
        ),
    ]  # fmt: skip
    missing = {}
    for make in (_lightning, _wandb):
        try:
            found.append(make(stack))
        except ImportError as error:
            missing[make.__name__.strip("_")] = f"{error}"
    return found, missing


# ---- the trainings ------------------------------------------------------------------------------


class Training:
    """A model, its optimizer and the loss of its next batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[], torch.Tensor],
    ) -> None:
        self.model = model
        self._optimizer = optimizer
        self._loss = loss

    def backward(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()

    def step(self, look: Look) -> None:
        self.backward()
        look()
        self._optimizer.step()


@dataclass(frozen=True)
class Work:
    """A training, and how it is timed."""

    name: str
    title: str
    build: Callable[[], Training]
    turns: int
    steps: int
    """Timed in each turn, after as many that are not as `first` says."""
    first: int


_TOKENS = 128


def _gpt2() -> Training:
    """AdamW as Hugging Face's trainer has it, fused: its step is the shorter one to add to."""
    import transformers

    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (1, _TOKENS))
    return Training(
        model, optimizer, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss
    )


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.around(x))


def _resnet() -> Training:
    """ResNet-18 as it is made for CIFAR's 32 x 32 pixels, on random ones."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        layers += [Block(inputs, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Training(model, optimizer, lambda: nn.functional.cross_entropy(model(images), labels))


def _mlp() -> Training:
    """On scikit-learn's digits, 64 at a time."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loss() -> torch.Tensor:
        batch = torch.randint(len(labels), (64,))
        return nn.functional.cross_entropy(model(pixels[batch]), labels[batch])

    return Training(model, optimizer, loss)


WORKS = (
    Work("gpt2", "GPT-2, 124 M parameters, 128 tokens", _gpt2, turns=9, steps=1, first=1),
    Work("resnet", "ResNet-18, 32 images of 32 x 32", _resnet, turns=11, steps=1, first=1),
    Work("mlp", "MLP of 6 parameters, 64 digits", _mlp, turns=15, steps=50, first=5),
)


# ---- in turns -----------------------------------------------------------------------------------


def check(training: Training, tools: Sequence[Tool]) -> dict[str, dict[str, float]]:
    """Every tool's worst errors for one and the same backward pass.

    Raises AssertionError where a tool's figures are wrong, or not those of all gradients.
    """
    with ExitStack() as stack:
        looks = [(tool, stack.enter_context(tool.attached(training.model))) for tool in tools]
        training.backward()
        results = [(tool, look()) for tool, look in looks]
    expected = {name: exact(tensor) for name, tensor in tensors(training.model).items()}
    gradients = {name for name in expected if name.endswith(".grad")}
    errors = {}
    for tool, result in results:
        if tool.figures is not None:
            figures = tool.figures(result)
            assert figures.keys() >= gradients, f"{tool.name}: {gradients - figures.keys()}"
            wanted = expected if figures.keys() - gradients else gradients
            errors[tool.name] = worst_errors(
                figures, {name: expected[name] for name in wanted}, tool.tolerances
            )
    return errors


@dataclass(frozen=True)
class Timing:
    """Seconds a step, and the share of the processors that was this process's or free."""

    seconds: float
    free: float | None


def timed(training: Training, tool: Tool, work: Work) -> Timing:
    with tool.attached(training.model) as look:
        for _ in range(work.first):
            training.step(look)
        free = hardware.FreeShare()
        begin = time.perf_counter()
        for _ in range(work.steps):
            training.step(look)
        seconds = (time.perf_counter() - begin) / work.steps
        share = free()
    _wait_for_children()
    return Timing(seconds, share)


def summed_up(turns: Sequence[Mapping[str, Timing]]) -> dict[str, Any]:
    """Of each tool: the step, what it adds to that of "nothing" in the same turn, and the middle
    half of both."""
    found = {}
    for name in turns[0]:
        steps = [turn[name].seconds for turn in turns]
        bare = [turn["nothing"].seconds for turn in turns]
        added = [step - base for step, base in zip(steps, bare, strict=True)]
        shares = [share for turn in turns if (share := turn[name].free) is not None]
        found[name] = {
            "step_s": statistics.median(steps),
            "step_quartiles_s": _middle_half(steps),
            "added_s": statistics.median(added),
            "added_quartiles_s": _middle_half(added),
            "more": statistics.median(added) / statistics.median(bare),
            "more_quartiles": _middle_half([a / b for a, b in zip(added, bare, strict=True)]),
            "free": statistics.mean(shares) if shares else None,
        }
    return found


def _middle_half(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def measure(work: Work, tools: Sequence[Tool], turns: int) -> dict[str, Any]:
    """A training's figures for JSON."""
    torch.manual_seed(0)
    training = work.build()
    errors = check(training, tools)
    for tool in tools:  # memory, layouts and threads are there when the turns begin
        timed(training, tool, work)
    found = []
    draw = random.Random(0)
    for _ in range(turns):
        order = draw.sample(tools, len(tools))
        timings = {tool.name: timed(training, tool, work) for tool in order}
        found.append({tool.name: timings[tool.name] for tool in tools})
    named = tensors(training.model)
    result = summed_up(found)
    for tool in tools:
        result[tool.name]["title"] = tool.title
        if tool.name in errors:
            result[tool.name]["error"] = errors[tool.name]
    return {
        "title": work.title,
        "tensors": len(named),
        "bytes": sum(tensor.nbytes for tensor in named.values()),
        "turns": turns,
        "steps_a_turn": work.steps,
        "tools": result,
    }


_WAIT_SECONDS = 0.05
_WAITS = 60


def _wait_for_children() -> None:
    """Until processes that this one has started, wandb's for example, have nothing more to do."""
    before = _children_ticks()
    for _ in range(_WAITS if before else 0):
        time.sleep(_WAIT_SECONDS)
        now = _children_ticks()
        if now == before:
            return
        before = now


def _children_ticks() -> int:
    """Of processor time, all children together; 0 where there are none or /proc does not tell."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it may end meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                ticks += int(fields[11]) + int(fields[12])
    return ticks


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.step_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--quick", action="store_true", help="two turns: whether it runs at all")
    names = [work.name for work in WORKS]
    parser.add_argument("--only", default=",".join(names), help="of %(default)s")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(names):
        parser.error(f"expected --only of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {**hardware.describe("cpu"), "quick": options.quick, "steps": {}}
    print(paramstats.backend(), flush=True)
    with ExitStack() as stack:
        found, missing = tools(stack)
        report["missing"] = missing
        for work in WORKS:
            if work.name in only:
                turns = 2 if options.quick else work.turns
                try:
                    measured = measure(work, found, turns)
                except ImportError as error:
                    missing[work.name] = str(error)
                    continue
                report["steps"][work.name] = measured
                print(*lines(measured), sep="\n", flush=True)
        for name, reason in missing.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def lines(measured: dict[str, Any]) -> Iterator[str]:
    """A training's figures as text."""
    yield f"{measured['title']}, medians of {measured['turns']} turns"
    for tool in measured["tools"].values():
        low, high = tool["added_quartiles_s"]
        free = "" if tool["free"] is None else f", {tool['free']:.0%} free"
        yield (
            f"  {tool['title']:<40} {tool['step_s'] * 1e3:9.2f} ms, "
            f"added {tool['added_s'] * 1e3:9.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f}), "
            f"{tool['more']:+.1%}{free}"
        )


if __name__ == "__main__":
    main()
