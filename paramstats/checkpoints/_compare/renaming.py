"""Rename the tensors of a checkpoint as the user asks: regular expressions and a prefix."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from paramstats._core.format import one_line_name
from paramstats._core.options import Pattern
from paramstats.checkpoints._stored_tensors import StoredTensor

NameMap = Mapping[Pattern, str] | Iterable[tuple[Pattern, str]]
"""Regular expressions and what replaces their matches."""


def renamed(
    tensors: list[StoredTensor], side: str, strip: str | None, name_map: NameMap | None = None
) -> dict[str, str]:
    """Return the new names of tensors, by name.

    Args:
        tensors: of one checkpoint.
        side: "a" or "b".
        strip: a prefix to remove, with or without the dot after it.
        name_map: replacements, applied one after the other to the names without the prefix.

    Raises:
        TypeError, ValueError, re.error: `strip` or `name_map` is not what it should be, or two
            tensors would have the same name.
    """
    rules = _checked(name_map)
    if strip is not None and not isinstance(strip, str):
        raise TypeError(_text(f"a str for strip_{side}", strip))
    names = {name: name for tensor in tensors for name in tensor.names}
    if strip:
        begins = [name for name in names if name.startswith(strip)]
        names |= {name: name.removeprefix(strip).removeprefix(".") for name in begins}
        if names and not begins:
            _warn(f"names in {side} that begin with strip_{side}={strip!r}", names)
    for pattern, replacement in rules:
        try:
            new = {name: pattern.subn(replacement, old) for name, old in names.items()}
        except (re.error, IndexError) as error:  # a group that does not exist
            text = f"{pattern.pattern!r}: {replacement!r}"
            raise ValueError(
                f"{_text('replacements of regular expressions in map', text)}: {error}"
            ) from None
        if names and not any(count for _, count in new.values()):
            _warn(f"names in {side} that match {pattern.pattern!r} of map", names)
        names = {name: text for name, (text, _) in new.items()}
    names = {name: new for name, new in names.items() if new != name}
    _check_distinct(tensors, names, side)
    return names


def _checked(name_map: Any) -> list[tuple[re.Pattern[str], str]]:
    if name_map is None:
        return []
    expected = "a dict or pairs of regular expressions and replacements for map"
    pairs = name_map.items() if isinstance(name_map, Mapping) else name_map
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(_text(expected, name_map))
    rules = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(_text(expected, pair))
        pattern, replacement = pair
        if not isinstance(pattern, (str, re.Pattern)) or not isinstance(replacement, str):
            raise TypeError(_text(expected, pair))
        try:
            rules.append((re.compile(pattern), replacement))
        except re.error as error:
            raise re.error(f"{_text('a regular expression in map', pattern)}: {error}") from None
    return rules


def _check_distinct(tensors: list[StoredTensor], new: Mapping[str, str], side: str) -> None:
    """Raise ValueError if two tensors have the same name."""
    row_of: dict[str, tuple[int, str]] = {}
    for row, tensor in enumerate(tensors) if new else ():
        for name in tensor.names:
            key = new.get(name, name)
            other_row, other = row_of.setdefault(key, (row, name))
            if other_row != row:
                arguments = "map and strip_a" if side == "a" else "strip_b"
                raise ValueError(
                    f"paramstats.checkpoints.compare: expected {arguments} to leave every tensor "
                    f"of {side} its own name, got {_shown(key)} for {_shown(other)} and for "
                    f"{_shown(name)}"
                )


def _warn(expected: str, names: Iterable[str]) -> None:
    example = next(iter(names))
    warnings.warn(
        f"paramstats.checkpoints.compare: expected {one_line_name(expected)}, got none, "
        f"for example {_shown(example)}",
        RuntimeWarning,
        stacklevel=4,
    )


def _text(expected: str, got: object) -> str:
    return f"paramstats.checkpoints.compare: expected {expected}, got {got!r}"


def _shown(name: str) -> str:
    return f"'{one_line_name(name[:200])}'"
