"""Loggers: what is read back from their files is what was logged, to the last digit they keep."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import paramstats
from tests.integrations.arriving import have_figures_arrive_late
from tests.integrations.moments import network
from tests.test_docs import run_page

wandb = pytest.importorskip("wandb", reason="wandb is not installed")


def rows_of_wandb(folder: Path) -> list[dict[str, object]]:
    """The history in a run's file: LevelDB's log format, behind seven bytes of wandb's own."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process writes the file, and not all of it before `finish` returns
    (path,) = folder.rglob("*.wandb")
    rows = []
    for data in _log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def _log_records(data: bytes) -> Iterator[bytes]:
    position, record = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield record
            record = b""


def figures_in(row: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Without what else is in a row, such as the Trainer's own `grad_norm`."""
    statistics = {k.removeprefix(prefix): v for k, v in row.items()}
    return {
        k: v
        for k, v in statistics.items()
        if k.startswith(("param_", "grad_")) and k.count("/") == 1
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_page_s_loggers(folder, capsys):
    """Runs docs/training.md; of each logger in it the last statistics are read back."""
    last, runs = {}, {}
    for namespace in run_page("docs/training.md", capsys):
        if "watcher" in namespace:
            watcher = namespace.pop("watcher")
            last[len(last)] = watcher.summary.scalars()
            runs[len(last) - 1] = namespace.get("run")
    _scaled, of_wandb, of_mlflow, of_tensorboard, of_csv = last.values()

    row = rows_of_wandb(folder / "wandb")[-1]
    assert figures_in(row) == of_wandb and row["_step"] == 30

    import mlflow

    client = mlflow.MlflowClient()
    for key, value in of_mlflow.items():
        history = client.get_metric_history(runs[2].info.run_id, key)
        assert [m.step for m in history] == [0, 10, 20, 30] and history[-1].value == value

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs")).Reload()
    for key, value in of_tensorboard.items():
        found = events.Scalars(key)
        assert [e.step for e in found] == [0, 10, 20, 30]
        assert found[-1].value == torch.tensor(value, dtype=torch.float32).item()

    with open(folder / "statistics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {key: float(value) for step, key, value in rows if step == "30"} == of_csv
    assert len(rows) == 4 * len(of_csv)


@pytest.mark.parametrize("late", [False, True])
def test_wandb_loses_nothing_among_calls_of_ones_own(folder, monkeypatch, late):
    """Statistics that come a step late are in the row of their own step all the same."""
    if late:
        have_figures_arrive_late(monkeypatch)
    model = network()
    with wandb.init(), paramstats.watch(model, wandb.log, every=2) as watcher:
        expected = {}
        for step in range(5):
            with torch.no_grad():
                model[0].weight.mul_(0.5)
            watcher.step()
            expected[step] = paramstats.summarize(model).scalars() if step % 2 == 0 else {}
            wandb.log({"loss": float(step)}, step=step)
    rows = {row["_step"]: row for row in rows_of_wandb(folder)}
    assert {step: figures_in(row) for step, row in rows.items()} == expected
    assert [row["loss"] for row in rows.values()] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_wandb_with_calls_without_steps(folder, monkeypatch):
    """As the page advises: then nothing is lost, however many calls there are in a step."""
    have_figures_arrive_late(monkeypatch)

    def log(scalars: dict[str, float], step: int) -> None:
        wandb.log({**scalars, "step": step})

    model = network()
    with wandb.init(), paramstats.watch(model, log, every=2) as watcher:
        for _ in range(5):
            watcher.step()
            wandb.log({"loss": 1.0})
            wandb.log({"rate": 0.1})
    expected = paramstats.summarize(model).scalars()
    rows = [row for row in rows_of_wandb(folder) if "step" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(figures_in(row) == expected for row in rows)


def test_wandb_through_transformers(folder, monkeypatch):
    """The row's own axis is the Trainer's step; wandb's own steps are of no account."""
    from paramstats.integrations.transformers import ParamStatsCallback, reporters
    from tests.integrations.test_transformers import gpt2, trainer_of

    monkeypatch.setenv("WANDB_PROJECT", "test")
    trainer = trainer_of(folder, gpt2(), report_to="wandb", logging_steps=1, max_steps=4)
    trainer.add_callback(ParamStatsCallback(every=2, log=reporters(trainer)))
    trainer.train()
    wandb.finish()
    rows = [row for row in rows_of_wandb(folder) if figures_in(row, "train/")]
    assert [row["train/global_step"] for row in rows] == [1, 2, 4]
    for row in rows:
        moment = paramstats.summarize(trainer.moments[row["train/global_step"]])
        assert figures_in(row, "train/") == moment.scalars()
