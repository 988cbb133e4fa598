"""`summarize` of mappings and pairs with each backend: all kinds of tensors."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import torch

import paramstats
from paramstats._core import backend as backends
from tests.dtypes import DTYPES
from tests.oracle import check, exact
from tools.fuzz.elements import random_tensor
from tools.fuzz.modules import BACKENDS

NAMES = ("w", "a.b", "a.b.c", "ü", "\n", "", ".", "\0", "\ud800", "total", "x" * 300, "{kind}")

Case = tuple[torch.Tensor, torch.Tensor | None]
"""A tensor and a plain one with the same elements; None where its elements cannot be read."""


def run(seed: int) -> int:
    """Runs one case; returns its executions."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    backends._active = BACKENDS[rng.random() < 0.3]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _read(rng)
    finally:
        backends._active = BACKENDS[0]
    return 1


def _read(rng: random.Random) -> None:
    cases = {name: rng.choice(KINDS)(rng) for name in rng.sample(NAMES, rng.randrange(1, 5))}
    tensors = {name: tensor for name, (tensor, _) in cases.items()}
    source: Any = tensors
    if rng.random() < 0.5:
        source = rng.choice((iter, list, tuple))(list(tensors.items()))
    correction = rng.choice((0, 1, 1, 2.5, -3))
    summary = paramstats.summarize(source, correction=correction)
    assert list(summary) == list(cases)
    for name, (tensor, plain) in cases.items():
        entry = summary[name]
        assert entry.shape == tuple(tensor.shape) and entry.grad is None
        if plain is None:
            assert math.isnan(entry.mean) and name in summary.skipped
            continue
        assert name not in summary.skipped, summary.skipped
        check(entry, plain, correction)
    _use(rng, summary, cases)


def _use(rng: random.Random, summary: paramstats.Summary, cases: dict[str, Case]) -> None:
    """What is made from a summary must work for any statistics."""
    kind = rng.randrange(12)
    if kind == 0:
        str(summary), repr(summary), summary.table(width=60), summary._repr_html_()
    elif kind == 1:
        summary.findings()
    elif kind == 2:
        assert list(summary.to_dict()["params"]) == list(cases)
    elif kind == 3 and "total" not in cases:
        scalars = summary.scalars()
        for name, (_, plain) in cases.items():
            if plain is not None and plain.numel():
                share = scalars[f"param_zero_fraction/{name}"]
                assert share == exact(plain).zero_count / plain.numel()
    elif kind == 4:
        assert summary.total.count >= 0


def _plain(rng: random.Random) -> Case:
    tensor = random_tensor(rng)
    while tensor.numel() > 20_000:
        tensor = random_tensor(rng)
    return tensor, tensor


def _floats(rng: random.Random, *sizes: int) -> torch.Tensor:
    n = math.prod(sizes)
    return torch.tensor([rng.choice((0.0, 0.0, rng.gauss(0, 1))) for _ in range(n)]).view(sizes)


def _sparse(rng: random.Random) -> Case:
    dense = _floats(rng, 2 * rng.randrange(1, 8), 2 * rng.randrange(1, 8))
    layout = rng.choice(("coo", "csr", "csc", "bsr", "bsc"))
    block = (2, 2) if layout in ("bsr", "bsc") else None
    return dense.to_sparse(layout=getattr(torch, f"sparse_{layout}"), blocksize=block), dense


def _uncoalesced(rng: random.Random) -> Case:
    n = rng.randrange(1, 9)
    indices = torch.tensor([rng.randrange(20) for _ in range(n)])
    values = torch.tensor([float(rng.randrange(-3, 4)) for _ in range(n)])
    dense = torch.zeros(20).index_add_(0, indices, values)
    return torch.sparse_coo_tensor(indices[None], values, (20,)), dense


def _beyond_storage(rng: random.Random) -> Case:
    """Sizes, strides and an offset that the storage does not hold."""
    far = rng.choice((10, 1 << 20, 1 << 40, 1 << 61, (1 << 62) + 1))
    strides, offset = (far, 1), rng.choice((0, 5, far))
    if rng.random() < 0.3:
        strides, offset = (5, 1), -rng.randrange(1, far)
    x = torch._C._dynamo.guards._reinterpret_tensor(torch.ones(7), (2, 3), strides, offset)
    return x, None


class Subclass(torch.Tensor):
    """A subclass without code of its own."""


def _subclass(rng: random.Random) -> Case:
    tensor = random_tensor(rng, rng.randrange(50))
    return tensor.as_subclass(Subclass), tensor


def _reinterpreted(rng: random.Random) -> Case:
    """The bits of one dtype viewed as another of the same size."""
    tensor = random_tensor(rng, rng.randrange(50))
    other = rng.choice([d for d in DTYPES if d.itemsize == tensor.dtype.itemsize])
    return tensor.view(other), tensor.view(other)


KINDS = (_plain, _plain, _plain, _sparse, _uncoalesced, _beyond_storage, _subclass, _reinterpreted)
