"""Names of a table that are too long for it: different ones must stay different."""

from __future__ import annotations

import pytest
import torch

from paramstats import summarize
from paramstats._display.shorten import shorten

MOE = [
    f"model.layers.{i}.mlp.experts.{j}.{name}_proj.weight"
    for i in (0, 1, 11)
    for j in range(20)
    for name in ("up", "down")
]
NAMES = {
    "experts": MOE,
    "middle differs": [f"{'a' * 40}{i}{'b' * 40}" for i in range(120)],
    "long middle differs": ["a" * 40 + f"{i:3}" * 20 + "b" * 40 for i in range(30)],
    "prefixes": ["." + "a." * i for i in range(60)],
    "equal": ["layer." * 9] * 30,
    "looks shortened": ["…17.weight", "layer." * 9 + "17.weight", "layer." * 10 + "17.weight"],
}


@pytest.mark.parametrize("width", [8, 12, 20, 41, 80])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_different_names_stay_different(names, width):
    texts = shorten(names, width)
    assert len(set(texts)) == len(names) and max(map(len, texts)) <= width


def test_a_name_that_fits_is_whole_and_the_part_that_differs_is_shown():
    layers = [f"{'x.' * 20}{i}.attn.qkv.weight" for i in (17, 18)]
    texts = shorten(["lm_head", *layers, MOE[0]], 15)
    assert texts == [
        "lm_head",
        "…17….qkv.weight",
        "…18….qkv.weight",
        MOE[0][:4] + "…" + MOE[0][-10:],
    ]


@pytest.mark.parametrize("sort_by", [None, "name", "norm"])
@pytest.mark.parametrize("width", [60, 80, 100])
def test_every_line_of_a_summary_differs(width, sort_by):
    modules = {
        name.rpartition(".")[0].replace("model.", "model.text_model.encoder."): 0 for name in MOE
    }
    x = torch.ones(2)
    summary = summarize({f"{name}.{w}": x.clone() for name in modules for w in ("weight", "bias")})
    lines = summary.table(width=width, sort_by=sort_by).splitlines()
    if sort_by is not None:
        assert lines.pop(0) == "all names begin with model.text_model.encoder.layers."
        names = [line.split()[0] for line in lines[2 : 2 + len(summary)]]
        assert len(set(names)) == len(summary)
    assert max(map(len, lines)) <= width
