"""Blocks of a page that a command writes: what it measured last, between two comments.

<!-- benchmark:begin -->
...
<!-- benchmark:end -->
"""

from __future__ import annotations

from pathlib import Path


def replaced(text: str, block: str, content: str) -> str:
    """`text` with `content` in the block of that name.

    Raises ValueError where `text` has no such block.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"expected a line {begin} and, after it, a line {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def write(page: Path, block: str, content: str) -> None:
    """The same in a file."""
    page.write_text(replaced(page.read_text(), block, content))
