"""Children of fork(), in which torch counts on threads that they do not have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_is_forked_child = False


def _note_fork() -> None:
    global _is_forked_child
    _is_forked_child = True


os.register_at_fork(after_in_child=_note_fork)


@contextlib.contextmanager
def threads_that_exist() -> Iterator[None]:
    """In a child of fork() the calling thread alone: it has none of its parent's threads, and
    torch's operators on large tensors wait for them for ever."""
    if not _is_forked_child or (threads := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
