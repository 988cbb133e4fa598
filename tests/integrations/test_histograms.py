"""Histograms in loggers and pictures: what their files contain is what was counted."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

import paramstats
from paramstats import Histogram
from tests.integrations.training import loss, network


def read(x: torch.Tensor) -> Histogram:
    return paramstats.summarize({"x": x}, distribution=True)["x"].histogram


def trained() -> nn.Module:
    model = network()
    loss(model, 0).backward()
    return model


def histograms() -> dict[str, Histogram]:
    """Histograms of a real layer and its gradient, and of tensors that loggers may not expect."""
    summary = paramstats.summarize(trained(), distribution=True)
    every_exponent = torch.randint(0, 1 << 32, (50_000,)).sub(1 << 31).int().view(torch.float32)
    return {
        "weight": summary["0.weight"].histogram,
        "gradient": summary["0.weight"].grad.histogram,
        "every exponent": read(every_exponent),  # more than 512 bins
        "float64": read(torch.tensor([5e-324, -1.7e308, 1.0, math.inf], dtype=torch.float64)),
        "positive": read(torch.tensor([1.0, 3.0])),
        "zeros": read(torch.zeros(3)),
        "not finite": read(torch.tensor([math.nan, math.inf])),
        "scaled": paramstats.summarize(trained(), distribution=True, grad_scale=3.0)[
            "0.weight"
        ].grad.histogram,
    }


def test_wandb_stores_edges_and_counts(folder):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from tests.integrations.test_loggers import rows_of_wandb

    expected = histograms()
    with wandb.init() as run:
        for name, histogram in expected.items():
            edges, counts = histogram.to_numpy(max_bins=512)
            run.log({name: wandb.Histogram(np_histogram=(counts, edges))})
    found = {key: value for row in rows_of_wandb(folder) for key, value in row.items()}
    for name, histogram in expected.items():
        edges, counts = histogram.to_numpy(max_bins=512)
        assert found[f"{name}/_type"] == "histogram"
        assert found[f"{name}/values"] == counts.tolist()
        assert found[f"{name}/bins"] == edges.tolist()
        finite = histogram.count - histogram.nan_count
        assert counts.sum() == finite - histogram.pos_inf_count - histogram.neg_inf_count
    edges, counts = expected["every exponent"].to_numpy()
    with pytest.raises(ValueError, match="512"):
        wandb.Histogram(np_histogram=(counts, edges))


def test_tensorboard_stores_bins_and_moments(folder):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    expected = histograms()
    with SummaryWriter("runs") as writer:
        for name, histogram in expected.items():
            writer.add_histogram_raw(name, **histogram.to_tensorboard(), global_step=3)
    events = EventAccumulator("runs", size_guidance={"histograms": 0}).Reload()
    model = trained()
    for name, histogram in expected.items():
        (event,) = events.Histograms(name)
        edges, counts = histogram.to_numpy()
        stored = event.histogram_value
        assert event.step == 3 and stored.num == counts.sum()
        # TensorBoard stores empty bins at the end once.
        n = len(stored.bucket)
        assert stored.bucket == counts[:n].tolist() and not counts[n:].any()
        assert stored.bucket_limit == edges[1 : n + 1].tolist()
    for name, x in (("weight", model[0].weight), ("gradient", model[0].weight.grad)):
        (event,) = events.Histograms(name)
        stored, x = event.histogram_value, x.detach().double()
        assert (stored.min, stored.max, stored.num) == (x.min(), x.max(), x.numel())
        assert stored.sum == pytest.approx(x.sum().item(), rel=1e-5)
        assert stored.sum_squares == pytest.approx(x.square().sum().item(), rel=1e-6)


def test_matplotlib_draws_every_bin():
    matplotlib = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawable = histograms()
    del drawable["float64"]  # matplotlib adds up all edges, which overflows
    for histogram in drawable.values():
        edges, counts = histogram.to_numpy()
        figure = matplotlib.Figure()
        axes = figure.subplots()
        steps = axes.stairs(counts, edges)
        axes.set_xscale("symlog", base=2, linthresh=max(edges[-1], -edges[0]) / 2**30)
        figure.canvas.draw()
        values, drawn, _ = steps.get_data()
        assert values.tolist() == counts.tolist() and drawn.tolist() == edges.tolist()


def test_lightning_reads_distributions_and_rows(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from tests.integrations.test_lightning import Module, ParamStatsCallback, fit

    module, seen = Module(), {}

    def log(scalars: dict[str, float], step: int) -> None:
        seen[step] = scalars, callback.watcher.summary

    options = {"distribution": r"net\.0\.weight", "rows": True, "stats": ("norm", "kurtosis")}
    callback = ParamStatsCallback(every=2, log=log, **options)
    fit(module, tmp_path, callback, batches=4)
    check(seen, module.snapshots, "net.0.weight", "net.0.bias", (0, 2))


def test_transformers_reads_distributions_and_rows(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.integrations.test_transformers import ParamStatsCallback, gpt2, trainer_of

    logging.getLogger("transformers").setLevel(logging.ERROR)
    seen = {}

    def log(scalars: dict[str, float], step: int) -> None:
        seen[step] = scalars, callback.watcher.summary

    weight, other = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"
    options = {"distribution": weight, "rows": True, "stats": ("norm", "kurtosis")}
    callback = ParamStatsCallback(every=2, log=log, **options)
    trainer = trainer_of(tmp_path, gpt2(), callback)
    trainer.train()
    check(seen, trainer.snapshots, weight, other, (1, 2, 4))


def check(seen, snapshots, name: str, other: str, steps: tuple[int, ...]) -> None:
    """Check what was logged and read, with copies of the tensors of the same steps."""
    assert tuple(seen) == steps
    for step, (scalars, summary) in seen.items():
        assert [key for key in scalars if "kurtosis" in key] == [
            f"param_kurtosis/{name}", f"grad_kurtosis/{name}"]  # fmt: skip
        expected = paramstats.summarize(snapshots[step], distribution=True, rows=True)
        assert scalars[f"grad_kurtosis/{name}"] == expected[name].grad.kurtosis
        assert summary[name].grad.histogram == expected[name].grad.histogram
        assert summary[other].histogram is None
        for one in (name, other):
            rows, truth = summary[one].grad.rows, expected[one].grad.rows
            assert rows == truth and len(rows) == len(snapshots[step][one])
        assert np.isfinite(summary[name].rows.norm).all()
