"""The native functions for tables: any bytes, bounds, keys and numbers.

For valid arguments the result must be that of the Python functions.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from typing import Any

from paramstats._core import backend as backends
from paramstats._core import moments

EXTREMES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan, 3.0)
REFUSED = (TypeError, ValueError, IndexError, OverflowError)


def run(seed: int) -> int:
    """Runs one case; returns its executions."""
    rng = random.Random(seed)
    native = backends.active().native
    if rng.random() < 0.3:
        return _invalid_arguments(rng, native)
    tensors = rng.choice((0, 1, 1, 2, 4, 20, 200))
    are_states = rng.random() < 0.8
    table, total = (
        b"".join(_state(rng) if are_states else _any_row(rng) for _ in range(2 * n))
        for n in (tensors, rng.randrange(2))
    )
    begin = rng.randrange(tensors + 1)
    end = rng.randrange(begin, tensors + 1)
    _same(are_states, native.merge_rows, moments.merge_rows, table, begin, end)
    columns = bytes(rng.randrange(15) for _ in range(rng.randrange(1, 6)))
    rows = len(table + total) // moments.ROW.size
    keys = dict.fromkeys(f"k{i}" for i in range(rows * len(columns)))
    correction, grad_scale = rng.choice(EXTREMES), rng.choice(EXTREMES)
    are_valid_numbers = math.isfinite(correction) and grad_scale in (1.0, 0.5, 3.0, 1e308)
    is_valid = are_states and are_valid_numbers
    numbers = (correction, grad_scale)
    _same(is_valid, native.scalars, moments.scalars, table, total, keys, columns, *numbers)
    for index in range(min(2 * tensors, 8)):
        _same(is_valid, native.finalize_row, moments.finalize_row, table, index, *numbers)
        statistics = native.finalize_row(table, index, *numbers)
        one = native.statistic(table, index, columns[0], *numbers)
        assert repr(one) == repr(statistics[columns[0]])
    return 2 + min(2 * tensors, 8)


def _any_row(rng: random.Random) -> bytes:
    return rng.randbytes(moments.ROW.size) if rng.random() < 0.5 else _state(rng)


def _state(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return moments.ROW.pack(*moments.unread(rng.choice((moments.ABSENT, 0, 7, 1 << 40))))
    if kind < 0.25:
        return moments.ROW.pack(*moments.Moments())
    odd = [rng.choice((0, 0, 0, rng.randrange(3))) for _ in range(3)]
    count = sum(odd) + rng.choice((0, 1, 2, 100, 1 << 20, 1 << 50))
    low, high = sorted(rng.choice((0.0, 1e-300, -1e300, rng.gauss(0, 1))) for _ in range(2))
    mean = rng.choice((low, high, low / 2 + high / 2))
    m2 = 0.0 if low == high else rng.choice((1e-320, 1.0, 1e300, math.inf))
    if count == sum(odd):
        mean, m2, low, high = 0.0, 0.0, math.inf, -math.inf
    return moments.ROW.pack(count, rng.randrange(count + 1), *odd, mean, m2, low, high)


def _same(is_valid: bool, native: Any, python: Any, *args: Any) -> None:
    """Calls both functions; for valid arguments they must give the same result."""
    got = native(*args)
    if not is_valid:
        return
    wanted = python(*args)
    if isinstance(got, bytes):
        words = (moments.ROW.iter_unpack(rows) for rows in (got, wanted))
        pairs = [pair for rows in zip(*words, strict=True) for pair in zip(*rows, strict=True)]
    elif isinstance(got, tuple):
        pairs = list(zip(got, wanted, strict=True))
    else:
        assert list(got) == list(wanted)
        pairs = list(zip(got.values(), wanted.values(), strict=True))
    for a, b in pairs:
        assert a == b or (a != a and b != b) or abs(a - b) <= 1e-12 * abs(b), (got, wanted, args)


def _invalid_arguments(rng: random.Random, native: Any) -> int:
    """Passes invalid arguments: any exception of `REFUSED` or any result will do, but no crash."""
    junk: list[Any] = [
        None, 3, -1, 1 << 70, 2.5, "x", b"abc", [], {}, object(), float("nan"), rng.randbytes(100),
        b"\0" * 72 * 3, [1, 2], ["a", "b"], [0], [-1], [15], [1 << 40], bytearray(144), (1, 2),
        [FakeTensor()], native,
    ]  # fmt: skip
    calls = [
        lambda: native.merge_rows(rng.choice(junk), rng.choice(junk), rng.choice(junk)),
        lambda: native.merge_rows(rng.randbytes(150), rng.randrange(-1, 4), rng.randrange(-1, 4)),
        lambda: native.scalars(*(rng.choice(junk) for _ in range(6))),
        lambda: native.scalars(bytes(72 * 4), b"", dict.fromkeys(Changing.some()), b"\1", 1, 1),
        lambda: native.scalars(rng.randbytes(300), b"", dict.fromkeys("abcd"), b"\0", 1, 1),
        lambda: native.scalars(bytes(144), b"", {"a": 0, 2: 1}, rng.randbytes(1), 1, 1),
        lambda: native.finalize_row(*(rng.choice(junk) for _ in range(4))),
        lambda: native.statistic(*(rng.choice(junk) for _ in range(5))),
        lambda: native.statistic(bytes(144), rng.randrange(-1, 4), rng.randrange(-1, 17), 1.0, 1.0),
        lambda: native.finalize_row(rng.randbytes(150), rng.randrange(-1, 4), 1.0, 1.0),
        lambda: native.read(rng.choice(junk), rng.choice(junk), True),
        lambda: native.read([rng.choice(junk) for _ in range(3)], True, True),
        lambda: native.set_simd_level(rng.choice(junk)),
        lambda: native.walk(rng.choice(junk), rng.choice(junk), rng.choice(junk)),
        lambda: native.read(rng.choice(junk), True, True, rng.choice(junk)),
    ]
    with contextlib.suppress(*REFUSED):
        rng.choice(calls)()
    return 1


class FakeTensor:
    """Claims to be a tensor."""

    @property
    def __class__(self) -> Any:
        import torch

        return torch.Tensor


class Changing:
    """A key whose hash is different each time."""

    hashes = itertools.count()

    @classmethod
    def some(cls) -> list[Any]:
        return ["a", cls(), cls(), "b"]

    def __hash__(self) -> int:
        return next(self.hashes)
