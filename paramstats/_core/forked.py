"""Let torch operators run in a child of fork(), which has none of its parent's threads."""

from __future__ import annotations

import os

import torch

_forks = 0


def _note_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_note_fork)


def count() -> int:
    """Return how often this process or its parents have forked to become it."""
    return _forks


class OneThread:
    """Restrict torch to the calling thread in a `with` block, if a condition holds."""

    __slots__ = ("_is_needed", "_threads")

    def __init__(self, is_needed: bool) -> None:
        self._is_needed = is_needed and torch.get_num_threads() > 1

    def __enter__(self) -> None:
        if self._is_needed:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        if self._is_needed:
            torch.set_num_threads(self._threads)


def threads_that_exist() -> OneThread:
    """Restrict torch to the calling thread in a child of fork().

    The child has none of its parent's threads, and torch's operators on large tensors would wait
    for them forever. Does nothing in other processes.
    """
    return OneThread(_forks > 0)
