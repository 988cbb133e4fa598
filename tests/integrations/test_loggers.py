"""Loggers: the values in their files are those that were logged."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import paramstats
from tests.integrations.deferred import defer_summaries_of_watch
from tests.integrations.training import loss, network
from tests.test_docs import run_page

wandb = pytest.importorskip("wandb", reason="wandb is not installed")


def rows_of_wandb(folder: Path) -> list[dict[str, object]]:
    """Return the history in a run's file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # waits until its process has written the file
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
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def statistics_in(row: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return the statistics of a row, without other values such as the Trainer's `grad_norm`."""
    found = {key.removeprefix(prefix): value for key, value in row.items()}
    return {
        key: value
        for key, value in found.items()
        if key.startswith(("param_", "grad_")) and key.count("/") == 1
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_loggers_of_the_documentation_have_the_last_statistics(folder, capsys):
    """Runs docs/training.md and reads the files of each logger in it."""
    last, runs = [], []
    for namespace in run_page("docs/training.md", capsys):
        if "watcher" in namespace:
            last.append(namespace.pop("watcher").summary.scalars())
            runs.append(namespace.get("run"))
    _histograms, _scaled, _restarted, of_wandb, of_mlflow, of_tensorboard, of_csv = last

    row = rows_of_wandb(folder / "wandb")[-1]
    assert statistics_in(row) == of_wandb and row["_step"] == 30

    import mlflow

    client = mlflow.MlflowClient()
    for key, value in of_mlflow.items():
        history = client.get_metric_history(runs[4].info.run_id, key)
        assert [m.step for m in history] == [0, 10, 20, 30] and history[-1].value == value

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs")).Reload()
    for key, value in of_tensorboard.items():
        found = events.Scalars(key)
        assert [e.step for e in found] == [0, 10, 20, 30]
        assert found[-1].value == torch.tensor(value, dtype=torch.float32).item()

    events = EventAccumulator(str(folder / "histograms"), {"histograms": 0}).Reload()
    found = events.Histograms("gradient/0.weight")
    assert [e.step for e in found] == [0, 10, 20, 30]
    assert all(sum(e.histogram_value.bucket) == 64 * 32 for e in found)
    assert [e.value for e in events.Scalars("units without gradient")] == [0.0] * 4

    with open(folder / "statistics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {key: float(value) for step, key, value in rows if step == "30"} == of_csv
    assert len(rows) == 4 * len(of_csv)


@pytest.mark.parametrize("is_deferred", [False, True])
def test_wandb_rows_have_the_statistics_of_their_step(folder, monkeypatch, is_deferred):
    """Deferred statistics are logged one step later, into the row of their own step."""
    if is_deferred:
        defer_summaries_of_watch(monkeypatch)
    model = network()
    with wandb.init(), paramstats.watch(model, wandb.log, every=2, grads=False) as watcher:
        expected = {}
        for step in range(5):
            with torch.no_grad():
                model[0].weight.mul_(0.5)
            watcher.step()
            summary = paramstats.summarize(model, grads=False)
            expected[step] = summary.scalars() if step % 2 == 0 else {}
            wandb.log({"loss": float(step)}, step=step)
    rows = {row["_step"]: row for row in rows_of_wandb(folder)}
    assert {step: statistics_in(row) for step, row in rows.items()} == expected
    assert [row["loss"] for row in rows.values()] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_wandb_calls_without_a_step_lose_nothing(folder, monkeypatch):
    """The way that the documentation shows for several calls of wandb.log per step."""
    defer_summaries_of_watch(monkeypatch)

    def log(scalars: dict[str, float], step: int) -> None:
        wandb.log({**scalars, "step": step})

    model = network()
    with wandb.init(), paramstats.watch(model, log, every=2, grads=False) as watcher:
        for _ in range(5):
            watcher.step()
            wandb.log({"loss": 1.0})
            wandb.log({"rate": 0.1})
    expected = paramstats.summarize(model, grads=False).scalars()
    rows = [row for row in rows_of_wandb(folder) if "step" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(statistics_in(row) == expected for row in rows)


def test_loggers_get_state_and_updates(folder, monkeypatch):
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    defer_summaries_of_watch(monkeypatch)
    model, writer = network(), SummaryWriter("runs")
    optimizer = torch.optim.AdamW(model.parameters())

    def log(scalars: dict[str, float], step: int) -> None:
        wandb.log(scalars, step=step)
        mlflow.log_metrics(scalars, step)
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)

    with (
        wandb.init(),
        mlflow.start_run() as run,
        paramstats.watch(model, log, optimizer=optimizer, every=2, stats="norm") as watcher,
    ):
        for step in range(4):
            loss(model, step).backward()
            optimizer.step()
    writer.close()
    expected = watcher.summary.scalars(stats="norm")
    kinds = "update_norm", "update_ratio", "exp_avg_norm", "grad_cosine_exp_avg", "optimizer_rms"
    assert {f"{kind}/0.weight" for kind in kinds} < expected.keys()
    row = rows_of_wandb(folder)[-1]
    assert {key: row[key] for key in expected} == expected and row["_step"] == 2
    assert mlflow.MlflowClient().get_run(run.info.run_id).data.metrics == expected
    events = EventAccumulator("runs").Reload()
    for key, value in expected.items():
        steps = {e.step: e.value for e in events.Scalars(key)}
        assert list(steps) == [0, 2] and steps[2] == torch.tensor(value).item()


def test_wandb_through_transformers(folder, monkeypatch):
    """The rows have the Trainer's step; wandb counts its own steps differently."""
    from paramstats.integrations.transformers import ParamStatsCallback, reporters
    from tests.integrations.test_transformers import gpt2, trainer_of

    monkeypatch.setenv("WANDB_PROJECT", "test")
    trainer = trainer_of(folder, gpt2(), report_to="wandb", logging_steps=1, max_steps=4)
    trainer.add_callback(ParamStatsCallback(every=2, log=reporters(trainer)))
    trainer.train()
    wandb.finish()
    rows = [row for row in rows_of_wandb(folder) if statistics_in(row, "train/")]
    assert [row["train/global_step"] for row in rows] == [1, 2, 4]
    for row in rows:
        summary = paramstats.summarize(trainer.snapshots[row["train/global_step"]])
        assert statistics_in(row, "train/") == summary.scalars()
