"""The reads of the native backend beyond the states of tensors, for `benches.in_turns`.

Each function yields titles and the calls to compare, whose results it has checked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benches.read_only import ReadOnly
from paramstats._core import backend as backends
from paramstats._core import moments

Call = Callable[[], Any]
Case = tuple[str, dict[str, Call]]

READ_ONLY = "read-only loop"
MEASURED = "the read with it"
_WITHOUT = "the read without it"
READ_DISTRIBUTION, READ_ROWS = 1, 2
"""Bits of the argument `details` of the native `read`."""

_ADAMW = (1e-3, 0.1, 0.9, 0.999, 1e-8, 100.0)


def updates() -> Iterator[Case]:
    """Compare the read of a float32 parameter, its state and its update with the memory limit."""
    native = backends.active().native
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(64 << 20, generator=generator) * scale

    weight, momentum, variance = noise(0.1), noise(1e-3), noise(1e-3).square_()
    gradient, old = noise(1e-3), weight + noise(1e-4)
    weight.requires_grad_().grad = gradient
    state = [weight, momentum, variance]
    formula = (-1, None, 1, *_ADAMW)
    cases = {  # the tensors of the list, the update, and all tensors that are read
        "parameter and copy": ([weight], (0, -1, -1, -1, -1, old, 2, *_ADAMW), [weight, old]),
        "parameter and Adam's state": (state, (0, -1, 1, 2, *formula), state),
        "the same and the gradient": (state, (0, 3, 1, 2, *formula), [*state, gradient]),
    }
    lr, decay, beta1, beta2, eps, step = _ADAMW
    ratio = momentum / ((variance / (1 - beta2**step)).sqrt_() + eps)
    by_adamw = ratio.mul_(lr / (1 - beta1**step)).add_(weight.detach(), alpha=lr * decay)
    changes = {1: by_adamw.div_(lr * decay - 1), 2: weight.detach() - old}
    for title, (listed, update, operands) in cases.items():
        with_grad = update[1] >= 0
        table = native.read(listed, True, with_grad, updates=(update,))[0]
        found = moments.row(table, 2 * len(listed))
        change = changes[update[6]]
        assert abs(found.mean - change.mean(dtype=torch.float64)) <= 1e-6 * change.std()
        calls = {
            READ_ONLY: ReadOnly([t.detach() for t in operands], torch.get_num_threads()),
            _WITHOUT: partial(native.read, listed, True, with_grad),
            MEASURED: partial(native.read, listed, True, with_grad, updates=(update,)),
        }
        yield f"{title}, 64 Mi elements of float32", calls


_ROW = struct.Struct("=3d2qQ")
"""The state of a row; 16 bytes come before the first one."""


def details() -> Iterator[Case]:
    """Compare the read of a tensor with its distribution or rows with the memory limit."""
    native = backends.active().native
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn((1 << 30) // dtype.itemsize, generator=generator).to(dtype)
        name = str(dtype).removeprefix("torch.")
        for number in (1024, 64):
            rows = x.view(-1, number)
            yield f"rows of {number}, 1 GiB of {name}", _with_details(native, rows, READ_ROWS)
        matrix = x.view(-1, 1024)
        yield f"distribution, 1 GiB of {name}", _with_details(native, matrix, READ_DISTRIBUTION)


def _with_details(native: Any, x: torch.Tensor, flag: int) -> dict[str, Call]:
    """Return the calls of one comparison, after a check of the result."""
    flags = bytes([flag])
    distribution, rows, _ = native.read([x], True, False, details=flags)[3][0]
    if rows is not None:
        last = x[-1].double()
        mean, m2, *_ = _ROW.unpack_from(rows, len(rows) - _ROW.size)
        assert len(rows) == 16 + len(x) * _ROW.size
        assert abs(mean - last.mean()) <= 1e-6 * last.square().mean().sqrt()
        assert abs(m2 - last.var() * (len(last) - 1)) <= 1e-5 * m2
    if distribution is not None:
        bins = struct.unpack_from("=2q", distribution)[1]
        counts = struct.unpack_from(f"={2 * bins}q", distribution, len(distribution) - 16 * bins)
        assert sum(counts) == x.count_nonzero()
    return {
        READ_ONLY: ReadOnly([x.flatten()], torch.get_num_threads()),
        _WITHOUT: partial(native.read, [x], True, False),
        MEASURED: partial(native.read, [x], True, False, details=flags),
    }
