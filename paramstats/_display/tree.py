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
    return _nodes(parts, 0, len(names), 0, 0, "")


def _nodes(
    parts: list[tuple[str, ...]],
    begin: int,
    end: int,
    position: int,
    depth: int,
    prefix: str,
) -> Iterator[Node]:
    """Yield the lines of the names [begin, end), whose parts before `position` are equal.

    `prefix` is the name of enclosing modules that have no line of their own.
    """
    for first, last in _runs(parts, begin, end, position):
        shortest = min(map(len, parts[first:last]))
        if last - first < _MIN_BLOCK or depth == _MAX_DEPTH or shortest <= position + 1:
            for row in range(first, last):
                label = prefix + ".".join(parts[row][position:])
                yield Node(depth, label, row, row + 1, False)
            continue
        # The block's label contains all parts that its names share, except a name's last part.
        split = position + 1
        while split < shortest - 1 and len({row[split] for row in parts[first:last]}) == 1:
            split += 1
        label = prefix + ".".join(parts[first][position:split])
        if all(stop - start >= _MIN_BLOCK for start, stop in _runs(parts, first, last, split)):
            # It contains only blocks, such as the layers of a transformer, and needs no own line.
            yield from _nodes(parts, first, last, split, depth, f"{label}.")
        else:
            yield Node(depth, label, first, last, True)
            yield from _nodes(parts, first, last, split, depth + 1, "")


def _runs(
    parts: list[tuple[str, ...]], begin: int, end: int, position: int
) -> list[tuple[int, int]]:
    """Return the ranges of neighboring names whose parts at `position` are equal."""
    at_position = [row[position : position + 1] for row in parts[begin:end]]
    neighbors = enumerate(itertools.pairwise(at_position), begin + 1)
    ends = [row for row, (before, after) in neighbors if before != after]
    return list(zip([begin, *ends], [*ends, end], strict=True)) if begin < end else []
