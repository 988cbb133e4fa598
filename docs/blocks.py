"""Writes Markdown tables into marked blocks of a page.

A block is the text between two comments:

<!-- benchmark:begin -->
...
<!-- benchmark:end -->
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return a Markdown table. The columns at the positions `right` are aligned right."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _parts(text: str, block: str) -> tuple[str, str, str]:
    """Split `text` at a block: the text up to its first comment, the content, and the rest.

    Raises ValueError if `text` does not contain the block.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, found, rest = text.partition(begin)
    inside, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"expected a line {begin} and a later line {end}")
    return before + begin, inside, end + after


def content(text: str, block: str) -> str:
    """Return the content of a block, without the line breaks around it."""
    return _parts(text, block)[1].strip("\n")


def replaced(text: str, block: str, content: str) -> str:
    """Return `text` with new content in a block."""
    before, _, after = _parts(text, block)
    return f"{before}\n{content}\n{after}"


def write(page: Path, block: str, content: str) -> None:
    """Replace the content of a block in a file."""
    page.write_text(replaced(page.read_text(), block, content))
