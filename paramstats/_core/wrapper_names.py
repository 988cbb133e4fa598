"""Remove what wrappers such as DDP and torch.compile add to parameters' names."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

_MARK_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_MARKS = re.compile(rf"(?<![^.])(?:{'|'.join(_MARK_NAMES)})\.(?=.)")
"""Parts of names that only wrappers add: torch.compile, activation checkpointing, FSDP."""

_FILE_MARK_NAMES = (
    *(*_MARK_NAMES, "_forward_module", "module"),  # DeepSpeed and Fabric; DDP
    *(r"base_model\.model", "base_layer", r"modules_to_save\.default"),  # PEFT
    *(rf"(?<=\.lora_{kind}\.)default" for kind in "AB"),
)
FILE_MARKS = re.compile(rf"(?<![^.])(?:{'|'.join(_FILE_MARK_NAMES)})\.(?=.)")
"""Parts of names in files that wrappers add. A model may use some of them itself, such as "module".
So they are ignored only where names differ otherwise."""

_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, AveragedModel)
"""Wrappers that keep the model as their child `module`, a name that models use, too."""

Names = tuple[str, ...]


def is_without_wrappers(names: Names, aliases: tuple[Names, ...]) -> bool:
    """Return whether `without_wrappers` returns these names as they are, for any source."""
    every_name = "\n".join((*names, *(name for several in aliases for name in several)))
    return "module" not in every_name and "_orig_mod" not in every_name


def without_wrappers(
    source: Any, names: Names, aliases: tuple[Names, ...]
) -> tuple[Names, tuple[Names, ...], tuple[Names, ...]]:
    """Return names and aliases without the parts that wrappers add, and the names with them.

    >>> import torch
    >>> from paramstats._core.wrapper_names import without_wrappers
    >>> model = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    >>> without_wrappers(model, ("module.weight", "module.bias"), ((), ()))
    (('weight', 'bias'), ((), ()), (('module.weight',), ('module.bias',)))

    A name stays as it is where two tensors would get the same one.

    Args:
        source: the module that the names belong to, or another source.
        names: the first name of every tensor.
        aliases: the other names of each.

    Returns:
        The names, the aliases, and the full names of each tensor, parallel to its name and aliases;
        no full names where nothing was removed.
    """
    if is_without_wrappers(names, aliases):
        return names, aliases, ()
    prefixes = _wrapper_prefixes(source) if isinstance(source, torch.nn.Module) else []

    def plain(name: str) -> str:
        for prefix in prefixes:
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        return _MARKS.sub("", name)

    rows = [
        {plain(name): name for name in (*reversed(others), first)}  # the first name wins
        for first, others in zip(names, aliases, strict=True)
    ]
    counts = Counter(name for row in rows for name in row)
    full = [
        {(short if counts[short] == 1 else name): name for short, name in reversed(row.items())}
        for row in rows
    ]
    if all(short == name for row in full for short, name in row.items()):
        return names, aliases, ()
    return (
        tuple(next(iter(row)) for row in full),
        tuple(tuple(row)[1:] for row in full),
        tuple(tuple(row.values()) for row in full),
    )


def _wrapper_prefixes(source: torch.nn.Module) -> list[str]:
    """Return the prefix of the names below each wrapper's child `module`, deepest first."""
    prefixes = []
    seen, remaining = {id(source)}, [("", source)]
    while remaining:  # not by named_modules, which recurses and needs the modules' hash
        path, module = remaining.pop()
        if isinstance(module, _WRAPPERS) or type(module).__name__ == "DeepSpeedEngine":
            prefixes.append(f"{path}module.")
        for name, child in list(getattr(module, "_modules", {}).items()):
            if isinstance(child, torch.nn.Module) and id(child) not in seen:
                seen.add(id(child))
                remaining.append((f"{path}{name}.", child))
    return sorted(prefixes, key=len, reverse=True)
