"""Turn dotted names into an outline of modules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MIN_BLOCK = 8
"""Minimum number of tensors for a module to get its own line. A Linear layer has only two."""

_MAX_DEPTH = 8
"""Deeper modules are not indented any further; their names keep the remaining parts."""


class Node(NamedTuple):
    """A line of an outline: a block with the names [begin, end), or a single name."""

    depth: int
    label: str
    begin: int
    end: int
    is_block: bool


def outline(names: Sequence[str]) -> Iterator[Node]:
    """Yield the lines of an outline that keeps the order of names.

    >>> names = [f"net.{layer}.{p}" for layer in (0, 1) for p in "abcdefgh"]
    >>> for node in list(outline([*names, "head.weight"]))[8:11]:
    ...     print("  " * node.depth + node.label)
      h
    net.1
      a
    """
    parts = [tuple(name.split(".")) for name in names]
    # Runs of names whose parts up to `position` are equal, with their depth and the name of
    # enclosing modules that have no line of their own. The next run is the last.
    stack = [(*run, 0, 0, "") for run in reversed(_runs(parts, 0, len(names), 0))]
    while stack:
        first, last, position, depth, prefix = stack.pop()
        is_block = last - first >= _MIN_BLOCK and depth < _MAX_DEPTH
        shortest = min(map(len, parts[first:last])) if is_block else 0
        if shortest <= position + 1:
            for row in range(first, last):
                label = prefix + ".".join(parts[row][position:])
                yield Node(depth, label, row, row + 1, False)
            continue
        # The block's label contains all parts that its names share, except a name's last part.
        split = position + 1
        while split < shortest - 1 and len({row[split] for row in parts[first:last]}) == 1:
            split += 1
        label = prefix + ".".join(parts[first][position:split])
        runs = _runs(parts, first, last, split)
        if all(stop - start >= _MIN_BLOCK for start, stop in runs):
            # It contains only blocks, such as the layers of a transformer, and needs no own line.
            prefix = f"{label}."
        else:
            yield Node(depth, label, first, last, True)
            depth, prefix = depth + 1, ""
        stack += [(*run, split, depth, prefix) for run in reversed(runs)]


def _runs(
    parts: list[tuple[str, ...]], begin: int, end: int, position: int
) -> list[tuple[int, int]]:
    """Return the ranges of neighboring names whose parts at `position` are equal."""
    at_position = [row[position : position + 1] for row in parts[begin:end]]
    neighbors = enumerate(itertools.pairwise(at_position), begin + 1)
    ends = [row for row, (before, after) in neighbors if before != after]
    return list(zip([begin, *ends], [*ends, end], strict=True)) if begin < end else []
