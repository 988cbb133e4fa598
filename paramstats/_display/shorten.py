"""Shorten the names of a table to a width, so that different names stay different."""

from __future__ import annotations

from collections.abc import Sequence

from paramstats._core.format import elide, printable


def common_prefix(names: Sequence[str]) -> str:
    """Return the modules that all names begin with, such as "model.layers."; "" for one name.

    >>> from paramstats._display.shorten import common_prefix
    >>> common_prefix(["model.up.weight", "model.upper.weight"])
    'model.'
    """
    if len(set(names)) < 2:
        return ""
    return names[0][: names[0].rfind(".", 0, _shared_length(names)) + 1]


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Return a different text of at most `width` characters for each name.

    A name that is too long loses its middle. If another one then looks the same, the part where
    they differ is shown instead. Where this is too long as well, a number tells them apart.

    >>> from paramstats._display.shorten import shorten
    >>> shorten([f"model.layers.{i}.mlp.down_proj.weight" for i in (17, 18)], 18)
    ['…17…wn_proj.weight', '…18…wn_proj.weight']

    Args:
        names: each is another tensor's, also where two are equal.
        width: at least 12.
    """
    texts = [elide(name, width) for name in names]
    for rows in _look_alike(texts):
        parts = _differing_parts([names[row] for row in rows], width)
        for row, part in zip(rows, parts, strict=True):
            texts[row] = part
    used, mark = set(texts), printable("…", "~")
    for rows in _look_alike(texts):
        number = 1
        for row in rows[1:]:
            while texts[row] in used:
                number += 1
                tag = f"{mark}{number}"
                texts[row] = names[row][: width - len(tag)] + tag
            used.add(texts[row])
    return texts


def _look_alike(texts: Sequence[str]) -> list[list[int]]:
    """Return the rows of each text that is there twice or more."""
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows_of.setdefault(text, []).append(row)
    return [rows for rows in rows_of.values() if len(rows) > 1]


def _shared_length(names: Sequence[str]) -> int:
    """Return the number of characters that all names begin with."""
    first, last = min(names), max(names)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(first), len(last)))


def _differing_parts(labels: Sequence[str], width: int) -> list[str]:
    """Return the part of each label that others do not have, and as much after it as fits."""
    mark = printable("…", "~")
    begin = _shared_length(labels)
    mirrored = [label[begin:][::-1] for label in labels]
    tail = _shared_length(mirrored)
    return [_part(label, begin, len(label) - tail, width, mark) for label in labels]


def _part(label: str, begin: int, end: int, width: int, mark: str) -> str:
    """Return a label without what is before `begin`, and with the middle of what is after `end`."""
    # Whole words if they fit: "17" instead of "7", where another label has "18".
    word = label.rfind(".", 0, begin) + 1, label.find(".", end)
    for first, last in (word, (begin, end)):
        left = width - 2 * len(mark) - (last - first)
        if last >= 0 and left >= 0:
            if len(label) - last <= left + len(mark):  # all that follows fits
                return mark + label[len(label) - width + len(mark) :]
            return mark + label[first:last] + mark + label[len(label) - left :]
    return elide(label, width)
