"""What the processes of a group must know of each other's tensors before they can be joined."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paramstats._core.elements import numel
from paramstats._core.layout import Layout
from paramstats._core.shard import LocalShard
from paramstats._sharded.merging import word_for

_MOST_KEPT = 64


class Content(NamedTuple):
    """A process's layout as the others need it: without the numbers of devices."""

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    parameters: int
    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]
    requires_grad: tuple[bool, ...]
    numels: tuple[int, ...]


_digests: weakref.WeakKeyDictionary[Layout, tuple[Content, bytes]] = weakref.WeakKeyDictionary()
_digests_by_content: dict[Content, bytes] = {}


def content_of(layout: Layout, rows: Sequence[Any]) -> tuple[Content, bytes]:
    """And its digest, which takes milliseconds for thousands of tensors the first time."""
    found = _digests.get(layout)
    if found is None:
        content = Content(
            layout.names,
            layout.aliases,
            layout.parameters,
            layout.shapes,
            layout.dtypes,
            tuple(device.type for device in layout.devices),
            layout.requires_grad,
            tuple(x.numel if isinstance(x, LocalShard) else numel(x) for x in rows),
        )
        digest = _digests_by_content.get(content)
        if digest is None:
            if len(_digests_by_content) >= _MOST_KEPT:
                _digests_by_content.clear()
            digest = _digests_by_content[content] = hashlib.sha256(repr(content).encode()).digest()
        found = _digests[layout] = (content, digest)
    return found


class Agreement(NamedTuple):
    """The same on every process, but for `positions`, which are its own."""

    id: int
    layout: Layout
    numels: Tensor
    """Elements of each whole tensor, gradients after tensors."""
    positions: Tensor
    """The row, among all processes' rows, of each row of this process."""


def agree(
    digests: Sequence[bytes],
    described: dict[bytes, Content],
    layout: Layout,
    ranks: Sequence[int],
) -> Agreement:
    """The union of what processes have: the first one's rows in its order, then what others add.

    Args:
        digests: of each process's content, in order.
        described: by digest.
        layout: this process's own.
        ranks: the processes' global ranks.

    Raises:
        ValueError: one name stands for tensors of different shapes. On every process alike.
    """
    first: dict[str, tuple[Content, int, int]] = {}
    seen = set()
    for place, digest in enumerate(digests):
        if digest in seen:
            continue
        seen.add(digest)
        content = described[digest]
        for row, name in enumerate(content.names):
            other, there, elsewhere = first.setdefault(name, (content, row, place))
            got = (
                (other.shapes[there], other.numels[there]),
                (content.shapes[row], content.numels[row]),
            )
            if got[0] != got[1]:
                raise ValueError(
                    f"paramstats.summarize: expected one shape for '{name}' on all processes, got "
                    f"{got[0][0]} of {got[0][1]} elements on rank {ranks[elsewhere]} and "
                    f"{got[1][0]} of {got[1][1]} on rank {ranks[place]}; different tensors need "
                    f"different names"
                )
    union = layout if len(seen) == 1 else _union(first, layout)
    own = [union.index[name] for name in layout.names]
    n = len(union)
    numels = [first[name][0].numels[first[name][1]] for name in union.names]
    return Agreement(
        word_for(list(digests)),
        union,
        torch.tensor(numels * 2, dtype=torch.int64),
        torch.tensor(own + [n + row for row in own], dtype=torch.int64),
    )


def _union(first: dict[str, tuple[Content, int, int]], layout: Layout) -> Layout:
    """Parameters first; a device is this process's own where it has the tensor."""
    found = [(name, *where) for name, where in first.items()]
    in_order = [f for f in found if f[2] < f[1].parameters]
    parameters = len(in_order)
    in_order += [f for f in found if f[2] >= f[1].parameters]
    at = {name: row for row, name in enumerate(layout.names)}
    return Layout(
        tuple(name for name, *_ in in_order),
        tuple(content.aliases[row] for _, content, row, _ in in_order),
        parameters,
        tuple(content.shapes[row] for _, content, row, _ in in_order),
        tuple(content.dtypes[row] for _, content, row, _ in in_order),
        tuple(
            layout.devices[at[name]] if name in at else torch.device(content.devices[row])
            for name, content, row, _ in in_order
        ),
        tuple(content.requires_grad[row] for _, content, row, _ in in_order),
    )
