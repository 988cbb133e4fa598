"""`summarize` of mappings and pairs, by each backend: every kind of tensor, argument and source."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import paramstats
from paramstats._core import backend as backends
from tools.fuzz.elements import DTYPES, Elements, Expected, some
from tools.fuzz.modules import ENGINES

NAMES = ("w", "a.b", "a.b.c", "ü", "\n", "", ".", "\0", "\ud800", "total", "x" * 300, "{kind}")
BAD_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"correction": math.nan}, {"correction": 10**400}, {"correction": torch.ones(2)},
    {"correction": "1"}, {"grad_scale": 0}, {"grad_scale": -1.0}, {"grad_scale": math.inf},
    {"grad_scale": 10**400}, {"grad_scale": 5e-324}, {"grad_scale": None}, {"include": 3},
    {"include": [None]}, {"exclude": object()},
)  # fmt: skip
BAD_SOURCES: tuple[Any, ...] = (
    None, 3, "abc", b"abc", object(), torch.ones(2), torch.nn.Linear, [1], [(1, 2, 3)], [("a",)],
    {"a": 1}, {"a": None}, {1: torch.ones(1)}, {None: torch.ones(1)}, [("a", 1)], [[]], {("a",): 1},
    [("a", torch.ones(1)), ("a", torch.ones(2))], iter([3]), {"a": {"b": torch.ones(1)}},
)  # fmt: skip


def run(seed: int) -> int:
    """One case; returns its executions."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    backends._active = ENGINES[rng.random() < 0.3]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _refused(rng) if rng.random() < 0.15 else _read(rng)
    finally:
        backends._active = ENGINES[0]


def _refused(rng: random.Random) -> int:
    source, arguments = {"w": torch.ones(3)}, {}
    if rng.random() < 0.5:
        arguments = rng.choice(BAD_ARGUMENTS)
    else:
        source = rng.choice(BAD_SOURCES)
        if hasattr(source, "__next__"):
            source = iter([3])
    with pytest.raises((TypeError, ValueError), match=r"^paramstats\.summarize: "):
        paramstats.summarize(source, **arguments)
    return 1


def _read(rng: random.Random) -> int:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    tensors: dict[str, torch.Tensor] = {}
    right: dict[str, Expected | None] = {}
    for name in names:
        tensors[name], right[name] = _one(rng)
    source: Any = tensors
    if rng.random() < 0.5:
        source = rng.choice((iter, list, tuple))(list(tensors.items()))
    correction = rng.choice((0, 1, 1, 2.5, -3))
    summary = paramstats.summarize(source, correction=correction)
    assert list(summary) == names
    for name in names:
        entry, expected = summary[name], right[name]
        assert entry.shape == tuple(tensors[name].shape) and entry.grad is None
        if expected is None:
            assert math.isnan(entry.mean) and name in summary.skipped
            continue
        assert name not in summary.skipped, summary.skipped
        expected.check(entry._state)
    _finish(rng, summary, right)
    return 1


def _finish(rng: random.Random, summary: paramstats.Summary, right: dict[str, Any]) -> None:
    """What stands on the summary works, too, whatever the statistics."""
    kind = rng.randrange(12)
    if kind == 0:
        str(summary), repr(summary), summary.table(width=60), summary._repr_html_()
    elif kind == 1:
        summary.findings()
    elif kind == 2:
        assert list(summary.to_dict()["params"]) == list(right)
    elif kind == 3 and "total" not in right:
        scalars = summary.scalars()
        for name, expected in right.items():
            if expected is not None:
                zeros, count = expected.counts[1], expected.counts[0]
                share = scalars[f"param_zero_fraction/{name}"]
                assert share == zeros / count if count else math.isnan(share)
    elif kind == 4:
        assert summary.total.count >= 0
    elif kind == 5:
        assert all(name in summary for name in right)


def _one(rng: random.Random) -> tuple[torch.Tensor, Expected | None]:
    """A tensor, and what its row must be; None where it cannot be read."""
    kind = rng.randrange(12)
    if kind < 3:
        elements = some(rng)
        while elements.numel > 20_000:
            elements = some(rng)
        return elements.tensor, elements.expected
    return SPECIAL[kind - 3](rng)


def _floats(rng: random.Random, n: int) -> np.ndarray:
    return np.array([rng.choice((0.0, 0.0, rng.gauss(0, 1))) for _ in range(n)], np.float32)


def _sparse(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    rows, columns = 2 * rng.randrange(1, 8), 2 * rng.randrange(1, 8)
    x = _floats(rng, rows * columns)
    dense = torch.from_numpy(x.copy()).view(rows, columns)
    layout = rng.choice(("coo", "csr", "csc", "bsr", "bsc"))
    block = (2, 2) if layout in ("bsr", "bsc") else None
    sparse = dense.to_sparse(layout=getattr(torch, f"sparse_{layout}"), blocksize=block)
    return sparse, Expected.of(x.astype(np.float64), False)


def _uncoalesced(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    n = rng.randrange(1, 9)
    where = [rng.randrange(20) for _ in range(n)]
    values = np.array([float(rng.randrange(-3, 4)) for _ in range(n)])
    x = np.zeros(20)
    np.add.at(x, where, values)
    return torch.sparse_coo_tensor([where], torch.from_numpy(values), (20,)), Expected.of(x, True)


def _quantized(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    x = torch.from_numpy(_floats(rng, rng.randrange(1, 40)))
    made = torch.quantize_per_tensor(x, 0.5, rng.randrange(5), torch.qint8)
    ints = made.int_repr().numpy().astype(np.float64) - made.q_zero_point()
    return made, Expected.of(ints * 0.5, False)


def _negated(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    x = _floats(rng, 2 * rng.randrange(1, 40))
    parts = torch.view_as_complex(torch.from_numpy(x.copy()).view(-1, 2))
    return parts.conj().imag, Expected.of(-x[1::2].astype(np.float64), False)


def _emptied(rng: random.Random) -> tuple[torch.Tensor, None]:
    x = torch.ones(rng.randrange(1, 100))
    x.untyped_storage().resize_(rng.randrange(x.numel()) * 4)
    return x, None


def _beyond(rng: random.Random) -> tuple[torch.Tensor, None]:
    """Sizes, strides and an offset that its storage does not hold."""
    far = rng.choice((10, 1 << 20, 1 << 40, 1 << 61, (1 << 62) + 1))
    if rng.random() < 0.3:
        return _unchecked((2, 3), (5, 1), -rng.randrange(1, far)), None
    return _unchecked((2, 3), (far, 1), rng.choice((0, 5, far))), None


def _unchecked(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    return torch._C._dynamo.guards._reinterpret_tensor(torch.ones(7), sizes, strides, offset)


class Subclass(torch.Tensor):
    pass


def _subclass(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    elements = some(rng, rng.randrange(50))
    return elements.tensor.as_subclass(Subclass), elements.expected


def _reviewed(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    """The bits of one type seen as another of the same size."""
    elements = some(rng, rng.randrange(50))
    same = [d for d in DTYPES if d.itemsize == elements.dtype.itemsize]
    other = rng.choice(same)
    seen = Elements(
        elements.buffer, elements.begin, other, elements.sizes, elements.strides, elements.offset
    )
    return elements.tensor.view(other), seen.expected


def _zero_tensor(rng: random.Random) -> tuple[torch.Tensor, Expected]:
    n = rng.randrange(1, 9)
    return torch._efficientzerotensor(n), Expected.of(np.zeros(n), False)


SPECIAL = (
    _sparse, _uncoalesced, _quantized, _negated, _emptied, _beyond, _subclass, _reviewed,
    _zero_tensor,
)  # fmt: skip
