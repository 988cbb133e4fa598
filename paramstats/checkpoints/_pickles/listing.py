"""List the tensors in the value of a pickle, each once, and what else is in it."""

from __future__ import annotations

import math
import sys
from typing import Any

from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._notes import not_tensors, shorten
from paramstats.checkpoints._pickles.stored_bytes import Source
from paramstats.checkpoints._pickles.tensors import MAX_REPEATS, SMALL_BYTES, Tensors
from paramstats.checkpoints._pickles.tree import Walk
from paramstats.checkpoints._stored_tensors import Contents, StoredTensor

_TENSOR = 1000
"""Bytes of memory that a tensor needs until its statistics are returned."""


def list_tensors(value: Any, source: Source) -> Contents:
    """Return the tensors in a value that was saved, under dotted names.

    Tensors with the same elements become one entry with aliases. If two have the same name, that of
    the second ends with " (2)". The notes name the objects whose data is in no tensor.
    """
    budget = source.files.budget
    left = MAX_REPEATS * source.size + SMALL_BYTES
    tensors: dict[str, StoredTensor] = {}
    names: dict[str, list[str]] = {}
    used: dict[str, int] = {}
    repeated: list[str] = []
    walk = Walk(budget, Tensors(source).find)
    for tensor in walk.tensors(value):
        name = tensor.name
        if name in used:
            repeated.append(name)
            name = _unused(name, used)
            budget.charge(sys.getsizeof(name))
        used[name] = 2
        has_elements = math.prod(tensor.shape) and tensor.parts
        # The repr, because a file can hold many tensors whose sizes have one hash.
        key = repr((tensor.parts, tensor.dtype, tensor.is_conj)) if has_elements else name
        if key not in tensors:
            budget.charge(_TENSOR)
            left -= math.prod(tensor.shape) * tensor.dtype.itemsize if tensor.parts else 0
            if left < 0:
                raise PickleError(f"tensors that repeat elements more than {MAX_REPEATS} times")
            tensors[key] = tensor._replace(name=name)
        names.setdefault(key, []).append(name)
    listed = [tensor._replace(aliases=tuple(names[key][1:])) for key, tensor in tensors.items()]
    notes = (*_notes_of_names(repeated), *not_tensors("object", walk.skipped))
    return Contents(listed, notes)


def _unused(name: str, used: dict[str, int]) -> str:
    """Return a name that no other tensor has; `used` has the next number to try of each."""
    while (new := f"{name} ({used[name]})") in used:
        used[name] += 1
    return new


def _notes_of_names(repeated: list[str]) -> tuple[str, ...]:
    if not repeated:
        return ()
    name = repeated[0]
    more = f", and {len(repeated) - 1:,} more" if len(repeated) > 1 else ""
    first, second = f"'{shorten(name)}'", f"'{shorten(name)} (2)'"
    return (f"two tensors are named {first}: the second is listed as {second}{more}",)
