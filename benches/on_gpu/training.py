"""What summaries add to the steps of a real training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import paramstats
from benches.contestants import item_loop_no_grad
from benches.on_gpu.backends import backends, engine_of, synchronize


@dataclass(frozen=True)
class Training:
    """A GPT-2 of some size, and batches for it."""

    title: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int


GPT2 = Training("GPT-2, 124 M parameters, bf16 autocast, AdamW", 12, 768, 12, 50_257, 16, 512)
TINY = Training("GPT-2 of two small layers", 2, 64, 2, 256, 2, 32)

_BLOCK = 10
"""Steps between two looks of a variant that looks now and then; what is timed at once."""


class Steps:
    """Real training steps on random tokens, with a place to look in after each backward pass."""

    def __init__(self, training: Training, device: torch.device) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=training.layers,
            n_embd=training.width,
            n_head=training.heads,
            vocab_size=training.vocabulary,
            n_positions=training.tokens,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.device = device
        model: Any = GPT2LMHeadModel(config)
        self.model: nn.Module = model.to(device)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=device.type == "cuda"
        )
        shape = (training.batch, training.tokens)
        self._ids = torch.randint(training.vocabulary, shape, device=device)

    def block(self, look: Callable[[nn.Module, int], None], end: Callable[[], None]) -> float:
        """Seconds of `_BLOCK` steps, from an empty queue to an empty queue."""
        synchronize(self.device)
        begin = time.perf_counter()
        for step in range(_BLOCK):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
            loss.backward()
            look(self.model, step)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        end()
        synchronize(self.device)
        return time.perf_counter() - begin


class Deferred:
    """Summarises every so many steps, and reads the statistics a step later."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._last: paramstats.Summary | None = None

    def __call__(self, model: nn.Module, step: int) -> None:
        new = paramstats.summarize(model) if step % self._every == 0 else None
        self.read()
        self._last = new

    def read(self) -> None:
        if self._last is not None:
            self._last.scalars()
        self._last = None


def _looks() -> dict[str, tuple[Callable[[nn.Module, int], None], Callable[[], None]]]:
    """What happens after the backward pass of each step, and at the end of a block."""

    def loop(model: nn.Module, step: int) -> None:
        if step == 0:
            item_loop_no_grad(model)

    now_and_then, always = Deferred(_BLOCK), Deferred(1)
    return {
        "nothing": (lambda model, step: None, lambda: None),
        "summary every 10 steps": (now_and_then, now_and_then.read),
        "summary every step, read a step later": (always, always.read),
        ".item() loop every 10 steps": (loop, lambda: None),
    }


def training_cost(
    training: Training, backend: str, turns: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds a step of each variant, and how much more than of none, in turns.

    The ratio is taken within each turn, whose first variant is another one every time.
    """
    steps = Steps(training, device)
    looks = _looks()
    seconds: dict[str, list[float]] = {name: [] for name in looks}
    with engine_of(backend):
        for look, end in looks.values():
            steps.block(look, end)
        for turn in range(turns):
            names = list(looks)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(steps.block(*looks[name]) / _BLOCK)
    base = seconds["nothing"]
    return {
        "title": training.title,
        "backend": backend,
        "tokens_a_step": training.batch * training.tokens,
        "turns": turns,
        "steps": {
            name: {
                "median_s": statistics.median(times),
                "more": statistics.median(t / b - 1 for t, b in zip(times, base, strict=True)),
                "all_s": times,
            }
            for name, times in seconds.items()
        },
    }


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    training = GPT2 if device.type == "cuda" else TINY
    return [training_cost(training, backends(device)[0], 3 if quick else 9, device)]


def lines(row: dict[str, Any]) -> Iterator[str]:
    for look, step in row["steps"].items():
        yield (
            f"a step of {row['title']}, {row['backend']}, {look}: "
            f"{step['median_s'] * 1e3:.2f} ms, {step['more']:+.2%}"
        )
