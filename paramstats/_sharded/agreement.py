"""Agree on the union of all ranks' tensors, which gives every tensor a row in the exchange."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paramstats._core.elements import numel
from paramstats._core.layout import Layout
from paramstats._core.shard import LocalShard
from paramstats._sharded.merging import hash_word
from paramstats._sharded.parts import Parts, union_of


class Content(NamedTuple):
    """What a rank tells the others about its tensors: `numels` has those of whole tensors."""

    layout: Layout
    numels: tuple[int, ...]
    parts: Parts


_Digest = tuple[tuple[int, ...], bytes]
_digests: weakref.WeakKeyDictionary[Layout, _Digest] = weakref.WeakKeyDictionary()


def content_of(layout: Layout, tensors: Sequence[Any], parts: Parts) -> tuple[Content, bytes]:
    """Return a rank's content and its SHA-256; cached, because hashing takes milliseconds.

    The numbers of devices are not hashed, because they differ between ranks.
    """
    found = _digests.get(layout)
    if found is None:
        numels = tuple(x.numel if isinstance(x, LocalShard) else numel(x) for x in tensors)
        *fields, devices, requires_grad, wrapper_names, _ = layout.fields
        device_types = tuple(device.type for device in devices)
        digest = _sha256((*fields, device_types, requires_grad, wrapper_names, numels))
        found = _digests[layout] = (numels, digest)
    numels, digest = found
    if parts.groups is not None:
        digest = _sha256((digest, *parts))
    return Content(layout, numels, parts), digest


@functools.lru_cache(maxsize=64)
def _sha256(content: tuple[Any, ...]) -> bytes:
    return hashlib.sha256(repr(content).encode()).digest()


Arguments = tuple[tuple[str, str], ...]
"""The names and values of arguments that must be equal on all ranks."""


def check_arguments(arguments: Sequence[Arguments], global_ranks: Sequence[int]) -> None:
    """Raise ValueError if the arguments of the ranks differ.

    Args:
        arguments: those of each rank.
        global_ranks: the ranks' numbers in the default group.
    """
    for values in zip(*arguments, strict=True):
        (name, expected), *others = values
        for rank, (_, got) in zip(global_ranks[1:], others, strict=True):
            if got != expected:
                raise ValueError(
                    f"paramstats.summarize: expected the same {name} on all ranks, got {expected} "
                    f"on rank {global_ranks[0]} and {got} on rank {rank}"
                )


class Agreement(NamedTuple):
    """The tensors of all ranks together. Equal on all ranks, except for `positions`."""

    id: int
    layout: Layout
    parts: Parts
    numels: Tensor
    """Elements of each whole tensor, then the same again for the gradients, then of the parts."""
    positions: Tensor
    """The row of each of this rank's tensors, gradients and parts."""


class _Source(NamedTuple):
    """The first rank that has a tensor of some name."""

    content: Content
    row: int
    rank: int


def agree(
    digests: Sequence[bytes],
    contents: dict[bytes, Content],
    own: Content,
    global_ranks: Sequence[int],
) -> Agreement:
    """Return the union: the first rank's tensors in their order, then what other ranks add.

    Args:
        digests: the digest of each rank's content.
        contents: the contents by digest.
        own: this rank's content.
        global_ranks: the ranks' numbers in the default group, for errors.

    Raises:
        ValueError: two ranks have different tensors of one name. Raised on all ranks.
    """
    first: dict[str, _Source] = {}
    senders: dict[bytes, int] = {}
    for rank, digest in enumerate(digests):
        senders.setdefault(digest, rank)
    for digest, rank in senders.items():
        content = contents[digest]
        for row, name in enumerate(content.layout.names):
            source = first.setdefault(name, _Source(content, row, rank))
            expected, got = _description(source), _description(_Source(content, row, rank))
            for what in expected:
                if got[what] != expected[what]:
                    raise ValueError(
                        f"paramstats.summarize: expected one {what} for {name!r} on all ranks, got "
                        f"{expected[what]} on rank {global_ranks[source.rank]} and {got[what]} on "
                        f"rank {global_ranks[rank]}; give different tensors different names"
                    )
    for source in first.values():
        for alias in source.content.layout.aliases[source.row]:
            if alias in first:
                name = source.content.layout.names[source.row]
                raise ValueError(
                    f"paramstats.summarize: expected the same tied tensors on all ranks, got "
                    f"{alias!r} tied to {name!r} on rank {global_ranks[source.rank]} and not on "
                    f"rank {global_ranks[first[alias].rank]}; tie it on all ranks"
                )
    union = own.layout if len(senders) == 1 else _union(first, own.layout)
    own_rows = [union.index[name] for name in own.layout.names]
    n = len(union)
    numels = [first[name].content.numels[first[name].row] for name in union.names]
    several = [(contents[digest].layout, contents[digest].parts) for digest in senders]
    parts = union_of(union, several)
    numels += numels + [part.numel for part in parts.rows]
    own_rows += [n + row for row in own_rows]
    own_rows += [2 * n + i for i in parts.indexes(union, own.layout, own.parts)]
    return Agreement(
        hash_word(list(digests)),
        union,
        parts,
        torch.tensor(numels, dtype=torch.int64, device="cpu"),
        torch.tensor(own_rows, dtype=torch.int64, device="cpu"),
    )


def _description(source: _Source) -> dict[str, object]:
    """Return what tensors of one name have in common on all ranks."""
    (layout, numels, _), row, _ = source
    return {
        "shape": layout.shapes[row],
        "number of elements": numels[row],
        "dtype": layout.dtypes[row],
        "kind": layout.kind(row),
    }


def _union(first: dict[str, _Source], layout: Layout) -> Layout:
    """Return a layout of all tensors, parameters first, with this rank's devices where it can."""

    def is_buffer(source: _Source) -> bool:
        return source.row >= source.content.layout.parameters

    sources = sorted(first.values(), key=is_buffer)
    rows = [content.layout.row(row) for content, row, _ in sources]
    names, aliases, shapes, dtypes, devices, requires_grad = zip(*rows, strict=True)
    own_devices = dict(zip(layout.names, layout.devices, strict=True))
    parameters = sum(not is_buffer(source) for source in sources)
    devices = tuple(
        own_devices.get(name, torch.device(device.type))
        for name, device in zip(names, devices, strict=True)
    )
    return Layout.shared(names, aliases, parameters, shapes, dtypes, devices, requires_grad)
