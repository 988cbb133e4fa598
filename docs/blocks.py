"""What commands write into pages: tables, in blocks between two comments.

<!-- benchmark:begin -->
...
<!-- benchmark:end -->
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """In Markdown; `right`: positions of the columns that are aligned there, as numbers are."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _parts(text: str, block: str) -> tuple[str, str, str]:
    """What stands before, in and after the block of that name; its two lines are not in it.

    Raises ValueError where `text` has no such block.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, found, rest = text.partition(begin)
    inside, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"expected a line {begin} and, after it, a line {end}")
    return before + begin, inside, end + after


def content(text: str, block: str) -> str:
    """What stands in the block of that name, without the line breaks around it."""
    return _parts(text, block)[1].strip("\n")


def replaced(text: str, block: str, content: str) -> str:
    """`text` with `content` in the block of that name."""
    before, _, after = _parts(text, block)
    return f"{before}\n{content}\n{after}"


def write(page: Path, block: str, content: str) -> None:
    """The same in a file."""
    page.write_text(replaced(page.read_text(), block, content))
