"""The native entry `read`: any tensors and gradients, any number of threads, any SIMD level."""

from __future__ import annotations

import random
import threading
from typing import NamedTuple

import torch

from paramstats._core import backend as backends
from paramstats._core.moments import ABSENT, ROW, Moments, row
from tests.oracle import Exact, check_exact, exact, stats_of
from tools.fuzz.elements import contiguous, random_tensor, strided_tensor

SMALL_STACK = 128 * 1024  # the kernels need less, but numpy checks the results on the same stack


class Entry(NamedTuple):
    """A tensor with its exact statistics and those of its gradient."""

    tensor: torch.Tensor
    param: Exact
    grad: Exact | None


def run(seed: int) -> int:
    """Runs one case; returns its executions."""
    rng = random.Random(seed)
    native = backends.active().native
    entries = _choose(rng, _pool(rng))
    params, grads = rng.random() < 0.9, rng.random() < 0.9
    is_large = sum(e.tensor.numel() * e.tensor.itemsize for e in entries) > 1 << 20
    executions = 0
    for level in native.simd_levels():
        native.set_simd_level(level)
        torch.set_num_threads(rng.randrange(1, 5) if is_large else 1)
        table = _read(native, entries, params, grads)
        executions += 1
        if is_large or rng.random() < 0.02:  # bitwise the same for any number of threads
            torch.set_num_threads(rng.randrange(1, 5))
            executions += _at_once(native, entries, params, grads, table)
    return executions


def _pool(rng: random.Random) -> list[Entry]:
    """The tensors of a case, some with a gradient."""
    large = rng.random() < 0.004  # enough elements for several threads
    pool = []
    for _ in range(3 if large else rng.choice((1, 1, 2, 3, 6))):
        tensor = random_tensor(rng, rng.randrange(1 << 17, 1 << 19) if large else None)
        if rng.random() < 0.5:
            tensor.grad = _gradient(rng, tensor)
        pool.append(
            Entry(tensor, exact(tensor), None if tensor.grad is None else exact(tensor.grad))
        )
    return pool


def _gradient(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient of the tensor's dtype and shape, in the same memory or with other strides."""
    if rng.random() < 0.2:
        return tensor.detach()
    sizes = tuple(tensor.shape)
    strides = tuple(0 if rng.random() < 0.2 else s for s in contiguous(sizes))
    return strided_tensor(rng, sizes, strides, rng.randrange(3), tensor.dtype)


def _choose(rng: random.Random, pool: list[Entry]) -> list[Entry]:
    """No entry, all of them, or a long list in which entries repeat."""
    kind = rng.random()
    if kind < 0.02:
        return []
    if kind < 0.9:
        return pool
    small = [entry for entry in pool if entry.tensor.numel() < 600] or pool[:1]
    first = small[0].tensor.numel()
    longest = 5000 if first < 100 and rng.random() < 0.1 else 40 if first <= 1000 else 3
    return [rng.choice(small) for _ in range(rng.randrange(longest))]


def _read(native, entries: list[Entry], params: bool, grads: bool) -> bytes:
    """Reads the tensors and checks every row of the table."""
    table, deferred, transfers, _ = native.read([entry.tensor for entry in entries], params, grads)
    assert not deferred and not transfers, deferred
    n = len(entries)
    assert len(table) == 2 * n * ROW.size
    checked: set[tuple[int, Moments]] = set()
    for i, entry in enumerate(entries):
        state = row(table, i)
        if params:
            _check(state, entry.param, checked)
        else:
            assert state.count == entry.tensor.numel() and state.mean != state.mean
        state = row(table, n + i)
        if grads and entry.grad is not None:
            _check(state, entry.grad, checked)
        else:
            assert state.count == ABSENT
    return table


def _check(state: Moments, expected: Exact, checked: set) -> None:
    key = id(expected), state
    if key not in checked:  # a list may hold one tensor thousands of times
        check_exact(stats_of(state), expected)
        checked.add(key)


def _at_once(native, entries, params: bool, grads: bool, table: bytes) -> int:
    """Two Python threads read the same tensors; in every second case they have small stacks."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            assert _read(native, entries, params, grads) == table
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(2)]
    before = threading.stack_size((len(entries) % 2) * SMALL_STACK)
    for caller in callers:
        caller.start()
    threading.stack_size(before)
    for caller in callers:
        caller.join()
    if errors:
        raise errors[0]
    return len(callers)
