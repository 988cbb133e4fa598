"""Turns of steps with each tool, and what they come to."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches import hardware
from benches.exact import exact, worst_errors
from benches.models import tensors
from benches.step_cost.tools import Tool
from benches.step_cost.trainings import Training, Work


def check(training: Training, tools: Sequence[Tool]) -> dict[str, dict[str, float]]:
    """Every tool's worst errors for one and the same backward pass.

    Raises AssertionError where a tool's statistics are wrong, or not those of all gradients.
    """
    with ExitStack() as stack:
        looks = [(tool, stack.enter_context(tool.attached(training.model))) for tool in tools]
        training.backward()
        results = [(tool, look()) for tool, look in looks]
    expected = {name: exact(tensor) for name, tensor in tensors(training.model).items()}
    gradients = {name for name in expected if name.endswith(".grad")}
    errors = {}
    for tool, result in results:
        if tool.statistics is not None:
            statistics = tool.statistics(result)
            assert statistics.keys() >= gradients, f"{tool.name}: {gradients - statistics.keys()}"
            wanted = expected if statistics.keys() - gradients else gradients
            errors[tool.name] = worst_errors(
                statistics, {name: expected[name] for name in wanted}, tool.tolerances
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
    """A training's statistics for JSON."""
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


def lines(measured: dict[str, Any]) -> Iterator[str]:
    """A training's statistics as text."""
    yield f"{measured['title']}, medians of {measured['turns']} turns"
    for tool in measured["tools"].values():
        low, high = tool["added_quartiles_s"]
        free = "" if tool["free"] is None else f", {tool['free']:.0%} free"
        yield (
            f"  {tool['title']:<40} {tool['step_s'] * 1e3:9.2f} ms, "
            f"added {tool['added_s'] * 1e3:9.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f}), "
            f"{tool['more']:+.1%}{free}"
        )
