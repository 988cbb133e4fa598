"""Find the tensors of two checkpoints that belong together although their names differ.

Names that agree come first. Those left over are compared without the parts that wrappers add, such
as "module.". What is still left over is compared without the heads of names, such as "model.".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from paramstats._core.format import elide, one_line_name
from paramstats._core.wrapper_names import FILE_MARKS
from paramstats.checkpoints._compare.heads import Entry, Match, by_head, may_be_one
from paramstats.checkpoints._stored_tensors import StoredTensor

_MAX_LENGTH = 2000
"""Names that are longer must agree: they are from files, and can have millions of parts."""

_MAX_LINES = 10
_MAX_PATTERN = 100

Pair = tuple[StoredTensor, StoredTensor]


class Alignment(NamedTuple):
    """Which tensors belong together."""

    pairs: list[Pair]
    """Tensors of a and b, in the order of a. Each has the name, of its own, that agrees."""
    only_in_a: list[StoredTensor]
    only_in_b: list[StoredTensor]
    lines: list[str]
    """How names that differ were mapped, for the user."""


def align(
    all_a: list[StoredTensor],
    all_b: list[StoredTensor],
    keys_a: Mapping[str, str],
    keys_b: Mapping[str, str],
) -> Alignment:
    """Pair the tensors of two checkpoints by name.

    A tensor with several names may be in several pairs. The state of an optimizer is never paired
    with a tensor of a model.

    Args:
        all_a, all_b: the tensors.
        keys_a, keys_b: other names for some of the names, which are compared instead of them.
    """
    left_a, left_b = _entries(all_a, keys_a), _entries(all_b, keys_b)
    matches: list[Match] = []
    ambiguous: list[Match] = []
    for step in range(3):
        if step == 1:
            left_a, left_b = _without_marks(left_a), _without_marks(left_b)
        found = by_head(left_a, left_b, ambiguous) if step == 2 else _by_key(left_a, left_b)
        matches += found
        done_a, done_b = {m.a.row for m in found}, {m.b.row for m in found}
        left_a = [entry for entry in left_a if entry.row not in done_a]
        left_b = [entry for entry in left_b if entry.row not in done_b]
    first: dict[tuple[int, int], Match] = {}
    for match in matches:
        first.setdefault((match.a.row, match.b.row), match)
    pairs = [
        (match.a.tensor._replace(name=match.a.name), match.b.tensor._replace(name=match.b.name))
        for _, match in sorted(first.items())
    ]
    paired_a, paired_b = ({rows[side] for rows in first} for side in (0, 1))
    return Alignment(
        pairs,
        [tensor for row, tensor in enumerate(all_a) if row not in paired_a],
        [tensor for row, tensor in enumerate(all_b) if row not in paired_b],
        [*_describe(first.values()), *_describe_ambiguous(ambiguous)],
    )


def _entries(tensors: list[StoredTensor], keys: Mapping[str, str]) -> list[Entry]:
    return [
        Entry(name, key := keys.get(name, name), key, row, tensor)
        for row, tensor in enumerate(tensors)
        for name in tensor.names
    ]


def _without_marks(entries: list[Entry]) -> list[Entry]:
    """Remove the parts that wrappers add, where this leaves different names; drop long names."""
    entries = [entry for entry in entries if len(entry.key) <= _MAX_LENGTH]
    keys = [FILE_MARKS.sub("", entry.key) for entry in entries]
    counts = Counter(keys)
    return [
        entry._replace(key=key) if counts[key] == 1 else entry
        for entry, key in zip(entries, keys, strict=True)
    ]


def _by_key(all_a: list[Entry], all_b: list[Entry]) -> list[Match]:
    by_key = {b.key: b for b in all_b}
    pairs = ((a, by_key[a.key]) for a in all_a if a.key in by_key)
    return [Match(a, b) for a, b in pairs if may_be_one(a, b)]


def _describe(matches: Iterable[Match]) -> list[str]:
    """Return lines such as "renamed: a 'module.*' = b '*' (148 tensors)"."""
    counts = Counter(
        (_pattern(m.a, m.heads[0]), _pattern(m.b, m.heads[1]))
        for m in matches
        if m.a.renamed != m.b.renamed
    )
    lines = [
        f"renamed: a {x} = b {y} ({_tensors(n)})" for (x, y), n in counts.most_common(_MAX_LINES)
    ]
    if len(counts) > _MAX_LINES:
        more = sum(counts.values()) - sum(n for _, n in counts.most_common(_MAX_LINES))
        lines.append(f"renamed: ... and {_tensors(more)} in other ways")
    explicit = sum(m.a.renamed != m.a.name or m.b.renamed != m.b.name for m in matches)
    if explicit:
        lines.insert(0, f"renamed as map, strip_a and strip_b say: {_tensors(explicit)}")
    return lines


def _describe_ambiguous(matches: list[Match]) -> list[str]:
    if not matches:
        return []
    several: dict[str, list[str]] = {}
    for match in matches:
        several.setdefault(match.a.name, []).append(match.b.name)
    a, others = max(several.items(), key=lambda item: len(item[1]))
    return [
        f"not paired: {_tensors(len(several))} of a with several candidates in b or the reverse, "
        f"such as a {_quoted(a)} and b {' or '.join(map(_quoted, others[:2]))}; name them with map"
    ]


def _tensors(n: int) -> str:
    return f"{n:,} tensor{'s' if n != 1 else ''}"


def _pattern(entry: Entry, head: str) -> str:
    """Return a name with "*" for all but its head and the parts that wrappers add."""
    parts: list[str] = []
    left, end = head.count("."), 0
    marks = FILE_MARKS.finditer(entry.renamed) if entry.key != entry.renamed else ()
    for mark in [*marks, None]:
        begin = len(entry.renamed) if mark is None else mark.start()
        kept = entry.renamed[end:begin].removesuffix(".").split(".") if begin > end else []
        parts += kept[:left]
        if len(kept) > left:
            parts.append("*")
        left = max(0, left - len(kept))
        if mark is not None:
            parts.append(mark[0][:-1])
            end = mark.end()
    return _quoted(".".join(parts))


def _quoted(name: str) -> str:
    return f"'{elide(one_line_name(name), _MAX_PATTERN)}'"
