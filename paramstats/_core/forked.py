"""Let torch operators run in a child of fork(), which has none of its parent's threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_forks = 0


def _note_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_note_fork)


def count() -> int:
    """Return how often this process or its parents have forked to become it."""
    return _forks


@contextlib.contextmanager
def threads_that_exist() -> Iterator[None]:
    """Restrict torch to the calling thread in a child of fork().

    The child has none of its parent's threads, and torch's operators on large tensors would wait
    for them forever. Does nothing in other processes.
    """
    if not _forks or (threads := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
