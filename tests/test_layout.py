"""`Layout`: shared and cached layouts are those of their own source, and take bounded memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import paramstats
from paramstats._core import layout as layouts
from paramstats._summary import layout_of

summarize = paramstats.summarize


class TiedWithWrapper(nn.Module):
    """A parameter whose second name is below a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        head = nn.Linear(3, 4, bias=False)
        head.weight = self.embed.weight
        self.head = nn.DataParallel(head)


def test_the_layout_of_another_source_with_the_same_names_is_not_used(backend):
    kept = summarize(TiedWithWrapper().state_dict(keep_vars=True))
    assert "head.module.weight" in kept
    assert "head.weight" in summarize(TiedWithWrapper())


def test_a_layout_that_was_selected_is_not_used_for_other_names(backend):
    a, b = torch.ones(2), torch.zeros(2)
    kept = summarize({"_orig_mod.w": a, "w": b}).filter(include="_orig_mod")
    assert list(kept) == ["_orig_mod.w"]
    assert list(summarize({"_orig_mod.w": a})) == ["w"]


@pytest.mark.parametrize("count", [3, 3000])
def test_only_few_and_small_layouts_are_kept_without_a_summary(backend, count):
    references = []
    for i in range(10):
        tensors = {f"{i}.{j}": torch.ones(1) for j in range(count)}
        references.append(weakref.ref(layout_of(summarize(tensors))))
    gc.collect()
    kept = sum(reference() is not None for reference in references)
    assert kept == (layouts._recent.maxlen if count == 3 else 0)


@pytest.mark.parametrize("stats", ["norm", ["norm"], ("norm",)], ids=str)
def test_keys_are_made_once_for_any_form_of_stats(backend, monkeypatch, stats):
    summary = summarize({"a": torch.ones(4)})
    expected = {"param_norm/a": 2.0, "param_norm/total": 2.0}
    assert summary.scalars(stats=stats) == expected
    keys = next(iter(layout_of(summary).keys.values()))
    assert summary.scalars(stats=stats) == expected
    assert list(layout_of(summary).keys.values()) == [keys]
    assert layout_of(summary).make_keys("{kind}_{stat}/{name}", ("norm",), b"\4", True) is keys
