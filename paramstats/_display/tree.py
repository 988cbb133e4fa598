"""The module tree that dotted names speak of, as lines of an outline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_BLOCK = 8
"""Names that make a block worth a line of its own: a Linear's two are one line each as they are."""

_DEEPEST = 8
"""Indentation ends here; what is deeper keeps the rest of its name."""


class Node(NamedTuple):
    """A line: a block of names [begin, end), or one name."""

    depth: int
    label: str
    begin: int
    end: int
    is_block: bool


def outline(names: Sequence[str]) -> list[Node]:
    """Names in their order, those of a module under one line that names it.

    >>> names = [f"net.{layer}.{p}" for layer in (0, 1) for p in "abcdefgh"]
    >>> for node in outline([*names, "head.weight"])[8:11]:
    ...     print("  " * node.depth + node.label)
      h
    net.1
      a
    """
    nodes: list[Node] = []
    _grow(nodes, [name.split(".") for name in names], 0, len(names), 0, 0, "")
    return nodes


def _grow(
    nodes: list[Node],
    parts: list[list[str]],
    begin: int,
    end: int,
    at: int,
    depth: int,
    prefix: str,
) -> None:
    """Names [begin, end), which agree up to part `at`; `prefix` is what has no line yet."""
    for first, last in _runs(parts, begin, end, at):
        shortest = min(len(parts[row]) for row in range(first, last))
        if last - first < _BLOCK or depth == _DEEPEST or shortest <= at + 1:
            for row in range(first, last):
                label = prefix + ".".join(parts[row][at:])
                nodes.append(Node(depth, label, row, row + 1, False))
            continue
        split = at + 1  # the parts that all have in common, the last part of a name not counted
        while split < shortest - 1 and len({parts[row][split] for row in range(first, last)}) == 1:
            split += 1
        label = prefix + ".".join(parts[first][at:split])
        if all(b - a >= _BLOCK for a, b in _runs(parts, first, last, split)):
            _grow(nodes, parts, first, last, split, depth, f"{label}.")  # a list of blocks
        else:
            nodes.append(Node(depth, label, first, last, True))
            _grow(nodes, parts, first, last, split, depth + 1, "")


def _runs(parts: list[list[str]], begin: int, end: int, at: int) -> list[tuple[int, int]]:
    """Stretches of neighbours with the same part at `at`."""
    runs = []
    first = begin
    for row in range(begin + 1, end + 1):
        if row == end or parts[row][at : at + 1] != parts[first][at : at + 1]:
            runs.append((first, row))
            first = row
    return runs
