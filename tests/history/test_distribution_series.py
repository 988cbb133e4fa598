"""Test the statistics of distributions over a history, as arrays and in data frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paramstats import History, summarize
from paramstats._core.options import DISTRIBUTION_STATS


def history_of_groups() -> tuple[History, list[dict[str, np.ndarray]]]:
    """Return a history whose third entry has no distribution, and the elements at each step."""
    history, elements = History(), []
    for step in range(5):
        torch.manual_seed(step)
        w = torch.nn.Parameter(torch.randn(30, 4, dtype=torch.float64) ** 3)
        w.grad = torch.rand(30, 4, dtype=torch.float64).exp() * 8
        v = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
        source = {"w": w, "v": v}
        history.append(step, summarize(source, distribution=step != 2, grad_scale=8.0))
        arrays = {"w": w.detach(), "v": v.detach(), "grad": w.grad / 8}
        elements.append({name: x.numpy().ravel() for name, x in arrays.items()})
    return history, elements


def expected(elements: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return skewness, kurtosis and abs_mean at each step, NaN at the third."""
    out = np.full((3, len(elements)), math.nan)
    for step, x in enumerate(elements):
        z = (x - x.mean()) / x.std()
        if step != 2:
            out[:, step] = (z**3).mean(), (z**4).mean(), np.abs(x).mean()
    return dict(zip(DISTRIBUTION_STATS, out, strict=True))


def test_series_of_distributions(backend):
    history, elements = history_of_groups()
    total = [np.concatenate([one["w"], one["v"]]) for one in elements]
    for series, arrays in (
        (history["w"], [one["w"] for one in elements]),
        (history["w"].grad, [one["grad"] for one in elements]),
        (history.total, total),
    ):
        for stat, values in expected(arrays).items():
            found = getattr(series, stat)
            assert found.dtype == np.float64 and found == pytest.approx(values, nan_ok=True)
        histograms = series.histogram
        assert histograms[2] is None and [h.count for h in histograms if h] == [len(arrays[0])] * 4
    assert (
        np.isnan(history["v"].grad.kurtosis).all() and np.isnan(history["w"].update.kurtosis).all()
    )


def test_data_frames_have_columns_of_distributions():
    pytest.importorskip("pandas", reason="pandas is not installed")
    history, elements = history_of_groups()
    frame = history.to_pandas()
    for prefix, name, key in (("", "w", "w"), ("grad_", "w", "grad"), ("", "v", "v")):
        for stat, values in expected([one[key] for one in elements]).items():
            found = frame[f"{prefix}{stat}"].xs(name, level="name").to_numpy()
            assert found == pytest.approx(values, nan_ok=True)
    assert frame["grad_kurtosis"].xs("v", level="name").isna().all()
    plain = History()
    plain.append(0, summarize({"w": torch.ones(3)}))
    assert not {*DISTRIBUTION_STATS} & {*plain.to_pandas().columns}
    assert [*plain.to_pandas(stats="kurtosis").columns] == ["kurtosis", "grad_kurtosis"]
    assert "kurtosis" not in history.to_pandas(stats="mean")
    with pytest.raises(ValueError, match=r"expected each of stats to be one .*'curtosis'"):
        history.to_pandas(stats="curtosis")
