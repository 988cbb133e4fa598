"""Lines below the table of a checkpoint file: what is outside of the total, and what is unusual."""

from __future__ import annotations

from collections.abc import Iterable

from paramstats._core.format import one_line_name
from paramstats._core.record import Record

_MAX_LINES = 20
"""Lines about tensors that could not be read, and about labels."""


def file_notes(record: Record) -> list[str]:
    """Return lines on groups of tensors, tensors that were not read, labels, and notes of the file.

    Empty if the tensors are not those of a file.
    """
    if record.file is None:
        return []
    names, groups, parameters = record.layout.names, record.file.groups, record.layout.parameters
    counts: dict[str, tuple[int, int]] = {}
    for row in range(parameters, len(names)):
        group = groups.get(names[row], "other")
        tensors, elements = counts.get(group, (0, 0))
        counts[group] = tensors + 1, elements + int(record.state(row).count)
    where = ", not in the total" if parameters else ""
    lines = [
        f"{group}: {_count(tensors, 'tensor')}, {_count(elements, 'element')}{where}"
        for group, (tensors, elements) in counts.items()
    ]
    if names and not parameters:
        lines.append("no total: none of these tensors is a weight of a model")
    labels = record.file.labels
    lines += _merged("not read: ", record.skipped.items())
    lines += _merged("", ((name, labels[name]) for name in names if name in labels))
    return lines + [one_line_name(note) for note in record.file.notes]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _merged(begin: str, texts: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each distinct text, with its first name and the number of others."""
    names_of: dict[str, list[str]] = {}
    for name, text in texts:
        names_of.setdefault(text, []).append(name)
    lines = []
    for text, (name, *others) in names_of.items():
        more = f" and {len(others):,} more" if others else ""
        lines.append(f"{begin}{one_line_name(name)}{more}: {one_line_name(text)}")
    hidden = len(lines) - _MAX_LINES
    return [*lines[:_MAX_LINES], f"{begin}... and {hidden:,} more"] if hidden > 0 else lines
