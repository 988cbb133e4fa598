"""Run a training and record it as users observe theirs; load such recordings."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

import paramstats
from tests.clinic.training import Case

OBSERVATIONS = ("summary", "watch", "health")
"""
- summary: `summarize(model)` after each backward pass.
- watch: `watch(model, optimizer=...)` after each step of the optimizer, with exact updates.
- health: `summarize(model, distribution=True, rows=True)` after every tenth backward pass.
"""


@dataclass
class Recording:
    """What was observed of a training."""

    case: Case
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    histories: dict[str, paramstats.History] = field(default_factory=dict)


def record(case: Case, folder: Path | None = None) -> Recording:
    """Run a training; with a folder, write its histories and its entry of the index there."""
    torch.manual_seed(0)
    out = Recording(case)
    for kind in OBSERVATIONS:
        path = folder and folder / f"{slug(case.name)}.{kind}.jsonl"
        if path:
            path.unlink(missing_ok=True)
        out.histories[kind] = paramstats.History(path)
    begin = time.perf_counter()
    training = case.make()
    histories = out.histories
    paramstats.watch(
        training.model, optimizer=training.optimizer, every=1, history=histories["watch"]
    )

    def observe(loss: float, grad_scale: object = 1.0) -> None:
        step = len(out.losses)
        out.losses.append(loss)
        options = {"grad_scale": grad_scale}
        histories["summary"].append(step, paramstats.summarize(training.model, **options))
        if step % 10 == 0:
            details = {"distribution": True, "rows": True}
            histories["health"].append(
                step, paramstats.summarize(training.model, **options, **details)
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.loop(observe)
    out.seconds = time.perf_counter() - begin
    for history in histories.values():
        history.close()
    if folder:
        fields = {k: v for k, v in vars(case).items() if k != "make"}
        fields |= {"sick": bool(case.codes), "losses": out.losses, "seconds": out.seconds}
        (folder / f"{slug(case.name)}.json").write_text(json.dumps(fields))
    return out


def replay(case: Case, folder: Path) -> Recording:
    """Load the recording of a case."""
    fields = json.loads((folder / f"{slug(case.name)}.json").read_text())
    histories = {
        kind: paramstats.History.load(folder / f"{slug(case.name)}.{kind}.jsonl")
        for kind in OBSERVATIONS
    }
    return Recording(case, fields["losses"], fields["seconds"], histories)


def slug(name: str) -> str:
    """Return a name as a part of a path."""
    return "".join(c if c.isalnum() else "-" for c in name)
