"""Select tensors of a checkpoint: a part of it, such as FILE#model, or names by patterns."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from paramstats._core.format import one_line_name
from paramstats._core.names import compile_patterns, passes
from paramstats._core.options import Pattern
from paramstats.checkpoints._errors import brief, unexpected
from paramstats.checkpoints._stored_tensors import Contents, StoredTensor

_MAX_LISTED = 12


def split_path(path: str | bytes | os.PathLike[str]) -> tuple[Path, str | None]:
    """Return the path of a checkpoint, and the part that follows "#"; None for all of it.

    >>> from paramstats.checkpoints._selection import split_path
    >>> split_path("/dev/null#model.encoder")
    (PosixPath('/dev/null'), 'model.encoder')

    A "#" belongs to the path if such a file exists. Raises FileNotFoundError for an empty path.
    """
    text = os.fsdecode(path)
    if not text:
        os.stat(text)  # raises: it must not become Path("."), the current folder
    end = len(text)
    while end > 0:
        if os.path.lexists(text[:end]):
            return Path(text[:end]), text[end + 1 :] if end < len(text) else None
        end = text.rfind("#", 0, end)
    return Path(text), None


def select_part(contents: Contents, part: str, path: Path) -> Contents:
    """Return the tensors whose names begin with `part` and a dot, without these in their names.

    The tensor with the name `part` itself keeps it. Raises CheckpointError if there are none.
    """
    tensors = []
    for tensor in contents.tensors:
        own = (tensor.name, *tensor.aliases)
        names = [n.removeprefix(f"{part}.") for n in own if f"{n}.".startswith(f"{part}.")]
        if names:
            weight_name = tensor.weight_name.removeprefix(f"{part}.")
            aliases = tuple(names[1:])
            tensors.append(tensor._replace(name=names[0], aliases=aliases, weight_name=weight_name))
    if not tensors:
        words = dict.fromkeys(t.name.partition(".")[0] for t in contents.tensors)
        listed = ", ".join(f"#{brief(word)[1:-1]}" for word in itertools.islice(words, _MAX_LISTED))
        more = f" and {len(words) - _MAX_LISTED:,} more" if len(words) > _MAX_LISTED else ""
        remedy = f"it has {listed}{more}" if words else "it has no tensors"
        raise unexpected("a part with tensors after '#'", brief(part), path, remedy)
    return contents._replace(tensors=tensors)


def select_names(
    contents: Contents,
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
    source: str,
    stacklevel: int,
) -> Contents:
    """Return the tensors whose names `include` and `exclude` let pass; warn if there are none.

    Args:
        contents: all tensors of a checkpoint.
        include, exclude: as in `summarize`.
        source: the path of the checkpoint, for the warning.
        stacklevel: the frame that the warning names, counted from the caller of this function.
    """
    included = None if include is None else compile_patterns(include, "include")
    excluded = () if exclude is None else compile_patterns(exclude, "exclude")
    if included is None and not excluded:
        return contents

    def is_selected(tensor: StoredTensor) -> bool:
        return any(passes((name,), included, excluded) for name in tensor.names)

    tensors = list(filter(is_selected, contents.tensors))
    if contents.tensors and not tensors:
        warnings.warn(
            f"paramstats.checkpoints: expected include and exclude to select tensors, got none of "
            f"{len(contents.tensors):,} in {one_line_name(source)}",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
    return contents._replace(tensors=tensors)
