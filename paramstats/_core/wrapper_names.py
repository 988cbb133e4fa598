"""Remove what wrappers such as DDP and torch.compile add to parameters' names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

_MARKS = re.compile(
    r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.(?=.)"
)
"""Parts of names that only wrappers add: torch.compile, activation checkpointing, FSDP."""

_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, AveragedModel)
"""Wrappers that keep the model as their child `module`, a name that models use, too."""

Names = tuple[str, ...]


def without_wrappers(
    source: Any, names: Names, aliases: tuple[Names, ...]
) -> tuple[Names, tuple[Names, ...], tuple[Names, ...]]:
    """Return names and aliases without the parts that wrappers add, and the names with them.

    >>> import torch
    >>> from paramstats._core.wrapper_names import without_wrappers
    >>> model = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    >>> without_wrappers(model, ("module.weight", "module.bias"), ((), ()))
    (('weight', 'bias'), ((), ()), (('module.weight',), ('module.bias',)))

    All names stay as they are, and the third tuple is empty, where there are no wrappers or two
    tensors would get the same name.

    Args:
        source: the module that the names belong to, or another source.
        names: the first name of every tensor.
        aliases: the other names of each.
    """
    full = [(name, *others) for name, others in zip(names, aliases, strict=True)]
    prefixes = []
    if isinstance(source, torch.nn.Module) and any("module." in n for all in full for n in all):
        prefixes = _wrapper_prefixes(source)

    def plain(name: str) -> str:
        for prefix in prefixes:
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        return _MARKS.sub("", name)

    short = [tuple(dict.fromkeys(map(plain, several))) for several in full]
    if short == full or len({n for all in short for n in all}) != sum(map(len, short)):
        return names, aliases, ()
    return (
        tuple(several[0] for several in short),
        tuple(several[1:] for several in short),
        tuple(
            tuple(name for name in before if name not in after)
            for before, after in zip(full, short, strict=True)
        ),
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
