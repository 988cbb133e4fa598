"""The native entry `read`: any tensors, gradients and list, on any threads and SIMD level."""

from __future__ import annotations

import random
import threading

import torch

from paramstats._core import backend as backends
from paramstats._core.moments import ABSENT, ROW
from tools.fuzz.elements import Elements, some

SMALL_STACK = 128 * 1024  # numpy, which checks there, needs more than the kernels


def run(seed: int) -> int:
    """One case; returns its executions."""
    rng = random.Random(seed)
    native = backends.active().native
    pool = _pool(rng)
    rows = _list(rng, pool)
    tensors = [elements.tensor for elements, _ in rows]
    params, grads = rng.random() < 0.9, rng.random() < 0.9
    is_large = sum(e.numel * e.dtype.itemsize for e, _ in rows) > 1 << 20
    executions = 0
    for level in native.simd_levels():
        native.set_simd_level(level)
        torch.set_num_threads(rng.randrange(1, 5) if is_large else 1)
        first = _checked(native, tensors, rows, params, grads)
        executions += 1
        if is_large or rng.random() < 0.02:  # bitwise the same, on however many threads
            torch.set_num_threads(rng.randrange(1, 5))
            executions += _at_once(native, tensors, rows, params, grads, first)
    return executions


def _pool(rng: random.Random) -> list[tuple[Elements, Elements | None]]:
    """Tensors of a case, each with its gradient."""
    large = rng.random() < 0.004  # more than one thread takes part
    count = 3 if large else rng.choice((1, 1, 2, 3, 6))
    pool: list[tuple[Elements, Elements | None]] = []
    for _ in range(count):
        elements = some(rng, rng.randrange(1 << 17, 1 << 19) if large else None)
        grad = _gradient(rng, elements) if rng.random() < 0.5 else None
        if grad is not None:
            elements.tensor.grad = grad.tensor
        pool.append((elements, grad))
    return pool


def _gradient(rng: random.Random, of: Elements) -> Elements:
    """Of the same type and shape, as torch demands; of other strides; perhaps the same memory."""
    if rng.random() < 0.2:
        return Elements(of.buffer, of.begin, of.dtype, of.sizes, of.strides, of.offset)
    grad = some(rng, of.numel, of.dtype)
    if grad.sizes != of.sizes:
        steps, reach = [], 1
        for size in of.sizes:
            steps.append(rng.choice((0, reach)))
            reach += (size - 1) * steps[-1] if size else 0
        room = (len(grad.buffer) - grad.begin) // of.dtype.itemsize
        if reach > room or room == 0:
            return Elements(of.buffer, of.begin, of.dtype, of.sizes, of.strides, of.offset)
        grad = Elements(grad.buffer, grad.begin, of.dtype, of.sizes, tuple(steps), 0)
    return grad


def _list(
    rng: random.Random, pool: list[tuple[Elements, Elements | None]]
) -> list[tuple[Elements, Elements | None]]:
    kind = rng.random()
    if kind < 0.02:
        return []
    if kind < 0.9:
        return pool
    small = [row for row in pool if row[0].numel < 600] or pool[:1]
    most = 5000 if small[0][0].numel < 100 and rng.random() < 0.1 else 40
    if small[0][0].numel > 1000:
        most = 3
    return [rng.choice(small) for _ in range(rng.randrange(most))]


def _checked(native, tensors, rows, params, grads) -> bytes:
    table, left, transfers = native.read(tensors, params, grads)
    assert not left and not transfers, left
    _check(table, rows, params, grads)
    return table


def _check(table: bytes, rows, params: bool, grads: bool) -> None:
    n = len(rows)
    assert len(table) == 2 * n * ROW.size
    states = list(ROW.iter_unpack(table))
    for i, (elements, grad) in enumerate(rows):
        if params:
            elements.expected.check(states[i])
        else:
            assert states[i][0] == elements.numel and states[i][5] != states[i][5]
        if grads and grad is not None:
            grad.expected.check(states[n + i])
        else:
            assert states[n + i][0] == ABSENT


def _at_once(native, tensors, rows, params, grads, first) -> int:
    """The same from several Python threads, every other time with small stacks."""
    wrong: list[BaseException] = []

    def call() -> None:
        try:
            assert _checked(native, tensors, rows, params, grads) == first
        except BaseException as error:
            wrong.append(error)

    callers = [threading.Thread(target=call) for _ in range(2)]
    before = threading.stack_size((len(tensors) % 2) * SMALL_STACK)
    for caller in callers:
        caller.start()
    threading.stack_size(before)
    for caller in callers:
        caller.join()
    if wrong:
        raise wrong[0]
    return len(callers)
