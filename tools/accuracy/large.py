"""Checks the error bound on tensors of ten million elements and on totals of a billion.

    python -m tools.accuracy.large                      20 minutes
    python -m tools.accuracy.large --elements 1000000

Totals are merged from states that repeat, so that a billion elements need little memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from paramstats._core import backend as backends
from paramstats._core import moments
from paramstats._core.backend import Implementation
from paramstats._core.moments import ABSENT, ROW, unread
from tests import oracle
from tests.dtypes import DTYPES
from tests.fake_cuda.building import FakeCuda
from tools.accuracy import bound
from tools.accuracy.adversarial import as_type

Shape = Callable[[int, np.random.Generator], np.ndarray]


def _outlier(n: int, r: np.random.Generator) -> np.ndarray:
    x = 1e-12 * (1 + 0.1 * r.standard_normal(n))
    x[n // 3] = 1
    return x


SHAPES: dict[str, Shape] = {
    "normal": lambda n, r: r.standard_normal(n),
    "common offset": lambda n, r: 1 + 1e-6 * r.standard_normal(n),
    "alternating signs": lambda n, r: 1.3 * (1 - 2.0 * (np.arange(n) % 2)),
    "one outlier": _outlier,
    "subnormals": lambda n, r: r.integers(-9, 10, n).astype(np.float64),
    "wide range of exponents": lambda n, r: r.choice([-1.0, 1.0], n) * 10.0 ** r.uniform(-30, 0, n),
    "sorted": lambda n, r: np.sort(r.standard_normal(n)),
    "reversed": lambda n, r: -np.sort(r.standard_normal(n)),
    "cancelling far apart": lambda n, r: np.sort(r.standard_normal(n)) * (np.arange(n) % 2 - 0.5),
    "NaN and infinities": lambda n, r: r.standard_normal(n),
    "a ramp from zero": lambda n, r: np.arange(n) / n,
}
"""Functions of the number of elements and a random generator; most elements are of size 1."""


def tensor_of(shape: str, dtype: torch.dtype, n: int) -> torch.Tensor:
    """Return `n` elements of a shape, in the middle of the range of the dtype or at its end."""
    x = SHAPES[shape](n, np.random.default_rng(0))
    tensor = as_type(x, dtype, 0.0 if shape == "subnormals" else 0.55)
    if shape == "NaN and infinities" and dtype.is_floating_point:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(dtype)
        if dtype is torch.float8_e4m3fn:  # it has no infinity
            odd = odd[:1]
        places = torch.arange(7, n, 1009)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        tensor.view(bits)[places] = odd.view(bits)[places % len(odd)]
    return tensor


def check_tensor(
    shape: str,
    dtype: torch.dtype,
    n: int,
    kinds: dict[str, Implementation],
    to: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yield the share of the bound that each backend uses; AssertionError outside the bound.

    `kinds` has the backends by name: "native", "reference" or "cuda".
    """
    tensor = tensor_of(shape, dtype, n)
    exact = oracle.exact(tensor)
    for kind, backend in kinds.items():
        on_device = to(tensor, 0) if to and kind == "cuda" else tensor
        state = bound.state_of(backend, on_device)
        yield kind, bound.assert_within(kind, state, exact, dtype).worst_used


def check_total(
    shape: str, dtype: torch.dtype, count: int, rows: int, kinds: dict[str, Implementation]
) -> Iterator[tuple[str, float]]:
    """Yield the shares for a total of `count` elements, which is merged from `rows` states.

    Ten different parts of one chunk at most repeat in turn.
    """
    parts = 10
    whole = tensor_of(shape, dtype, parts * count // rows)
    exact, times = oracle.exact(whole), rows // parts
    names = ("count", "zero_count", "nan_count", "pos_inf_count", "neg_inf_count", "n", "sum")
    many = {name: getattr(exact, name) * times for name in (*names, "sum_sq")}
    exact = dataclasses.replace(exact, **many)
    for kind, backend in kinds.items():
        states = [bound.state_of(backend, part) for part in whole.chunk(parts)]
        table = b"".join(ROW.pack(*state) for state in states) * times
        table += ROW.pack(*unread(ABSENT)) * rows
        state = moments.row(backend.merge_rows(table, 0, rows), 0)
        yield kind, bound.assert_within(kind, state, exact, dtype, merged=rows).worst_used


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.accuracy.large", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--count", type=int, default=1_000_000_000)
    options = parser.parse_args()
    begin = time.monotonic()
    kinds = {name: backends.choose(name) for name in ("native", "reference")}
    worst: dict[str, tuple[float, str]] = {}

    def keep(found: Iterator[tuple[str, float]], what: str) -> None:
        for kind, used in found:
            worst[kind] = max(worst.get(kind, (0.0, "")), (used, what))

    with tempfile.TemporaryDirectory() as folder:
        fake = None if torch.cuda.is_available() else FakeCuda(Path(folder))
        hard_kinds, to = kinds, None
        if fake:
            hard_kinds, to = kinds | {"cuda": fake.install(kinds["native"])}, fake.runtime.to
        for dtype in DTYPES:
            for shape in SHAPES:
                is_hard = shape == "common offset"  # the slow checks are for one shape per dtype
                every = hard_kinds if is_hard else kinds
                keep(check_tensor(shape, dtype, options.elements, every, to), f"{shape}, {dtype}")
                for rows in (10_000, 100_000) if is_hard else (10_000,):
                    found = check_total(shape, dtype, options.count, rows, kinds)
                    keep(found, f"total of {rows:,} states, {shape}, {dtype}")
            print(f"{dtype}: {(time.monotonic() - begin) / 60:.0f} min, {worst}", flush=True)
    for kind, (used, what) in worst.items():
        print(f"{kind}: at most {used:.0%} of the bound ({what})")


if __name__ == "__main__":
    main()
