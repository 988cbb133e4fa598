"""Measures how much time each tool adds to a training step.

    python -m benches.step_cost                      fifteen minutes on a CPU
    python -m benches.step_cost --only resnet,mlp
    python -m benches.step_cost --json FILE          write the results for benches.report

In each turn, every tool is attached to the same training for some steps and detached again. The
order is random, and the first steps with a tool are not timed. The time that a tool adds is the
difference to the steps without a tool in the same turn, so that changes in the load of the machine
affect both.

wandb runs offline, and TensorBoard writes to a temporary folder. A tool that reads distributions or
makes histograms does so for every parameter and gradient.
Lightning's norms stay tensors, as its function returns them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import paramstats
from benches import checks, hardware
from benches.models import tensors
from benches.step_cost.tools import Tool, available
from benches.step_cost.trainings import RECIPES, Recipe, Training
from benches.timing import quartiles, synchronize


def check(training: Training, tools: Sequence[Tool]) -> None:
    """Raise AssertionError if a tool's statistics are wrong or incomplete."""
    with ExitStack() as stack:
        model, optimizer = training.model, training.optimizer
        attached = [(tool, stack.enter_context(tool.attached(model, optimizer))) for tool in tools]
        training.backward()
        results = [(tool, run()) for tool, run in attached]
    expected = checks.expected(tensors(training.model))
    for tool, result in results:
        if tool.statistics is not None:
            checks.check(tool.statistics(result), expected, tool.tolerance, tool.required)


def timed(training: Training, tool: Tool, recipe: Recipe) -> float:
    """Return the seconds per step in one turn with a tool."""
    device = next(training.model.parameters()).device
    with tool.attached(training.model, training.optimizer) as run:
        for _ in range(recipe.untimed_steps):
            training.step(run)
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(recipe.steps):
            training.step(run)
        synchronize(device)
        return (time.perf_counter() - begin) / recipe.steps


def summarized(turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return medians and quartiles per tool: of a step, and of what the tool adds in a turn."""
    found = {}
    for name in turns[0]:
        steps = [turn[name] for turn in turns]
        without = [turn["nothing"] for turn in turns]
        added = [step - base for step, base in zip(steps, without, strict=True)]
        found[name] = {
            "step_s": statistics.median(steps),
            "step_quartiles_s": quartiles(steps),
            "added_s": statistics.median(added),
            "added_quartiles_s": quartiles(added),
            "more": statistics.median(added) / statistics.median(without),
        }
    return found


def measure(recipe: Recipe, tools: Sequence[Tool], device: torch.device) -> dict[str, Any]:
    """Check and time all tools in one training; return the results for JSON."""
    torch.manual_seed(0)
    training = recipe.build(device)
    check(training, tools)
    for tool in tools:  # warm-up
        timed(training, tool, recipe)
    found = []
    generator = random.Random(0)
    for _ in range(recipe.turns):
        order = generator.sample(tools, len(tools))
        found.append({tool.name: timed(training, tool, recipe) for tool in order})
    named = tensors(training.model)
    results = summarized(found)
    return {
        "title": training.title,
        "tensors": len(named),
        "bytes": sum(tensor.nbytes for tensor in named.values()),
        "turns": recipe.turns,
        "steps_a_turn": recipe.steps,
        "tools": {tool.name: {"title": tool.title, **results[tool.name]} for tool in tools},
    }


def _print(measured: dict[str, Any]) -> None:
    print(f"{measured['title']}, medians of {measured['turns']} turns")
    for tool in measured["tools"].values():
        low, high = (seconds * 1e3 for seconds in tool["added_quartiles_s"])
        print(
            f"  {tool['title']:<40} {tool['step_s'] * 1e3:9.2f} ms, added "
            f"{tool['added_s'] * 1e3:9.3f} ms ({low:.3f} to {high:.3f}), {tool['more']:+.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.step_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    names = ",".join(recipe.name for recipe in RECIPES)
    parser.add_argument("--only", help=f"some of {names}")
    options = parser.parse_args()
    device = torch.device(options.device)
    only = (options.only or ("gpt2" if options.device == "cuda" else names)).split(",")
    if unknown := set(only) - set(names.split(",")):
        parser.error(f"expected --only with some of {names}, got {', '.join(sorted(unknown))}")
    report = {**hardware.describe(options.device), "steps": {}}
    print(paramstats.backend(), flush=True)
    with ExitStack() as stack:
        tools, missing = available(stack, device)
        for recipe in RECIPES:
            if recipe.name in only:
                try:
                    report["steps"][recipe.name] = measure(recipe, tools, device)
                except ImportError as error:
                    missing[recipe.name] = str(error)
                else:
                    _print(report["steps"][recipe.name])
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    report["missing"] = missing
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
