"""Read and replace the parts of documentation pages that commands generate.

Such a block has a name and is between two comments:

<!-- benchmark:begin -->
...
<!-- benchmark:end -->
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return a Markdown table; `right` holds the positions of right-aligned columns."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _parts(text: str, block: str) -> tuple[str, str, str]:
    """Split `text` into what is before, inside and after a block.

    The two comments belong to the outer parts. Raises ValueError if there is no such block.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, found, rest = text.partition(begin)
    inside, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"expected a line {begin} and, after it, a line {end}")
    return before + begin, inside, end + after


def content(text: str, block: str) -> str:
    """Return the content of a block without surrounding line breaks."""
    return _parts(text, block)[1].strip("\n")


def replaced(text: str, block: str, content: str) -> str:
    """Return `text` with the content of a block replaced."""
    before, _, after = _parts(text, block)
    return f"{before}\n{content}\n{after}"


def write(page: Path, block: str, content: str) -> None:
    """Replace the content of a block in a file."""
    page.write_text(replaced(page.read_text(), block, content))
