"""Read small tensors whole: the scales, zero points and tables that belong to codes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch

from paramstats.checkpoints._errors import unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import StoredTensor, span

MAX_BYTES = 64 << 20
"""Bytes of a companion, and of all companions that are in memory at a time."""

Load = Callable[[], torch.Tensor]


class UnclearError(Exception):
    """Codes cannot be decoded; the message is the reason."""


class Companions:
    """Reads companions when they are needed, and keeps those that were used last."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._count = 0

    def loader(self, tensor: StoredTensor, convert: Callable[[torch.Tensor], torch.Tensor]) -> Load:
        """Return a function that returns a converted companion, and reads it if it is not kept.

        Raises UnclearError if it is not a plain tensor of at most `MAX_BYTES`.
        """
        check_size(tensor)
        key = self._count = self._count + 1

        def load() -> torch.Tensor:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            loaded = self._kept[key] = convert(self.read(tensor))
            while len(self._kept) > 1 and sum(x.nbytes for x in self._kept.values()) > MAX_BYTES:
                self._kept.popitem(last=False)
            return loaded

        return load

    def read(self, tensor: StoredTensor, limit: int | None = None) -> torch.Tensor:
        """Return a tensor's elements; raise UnclearError if they are more than `limit` bytes.

        The default is `MAX_BYTES`.
        """
        check_size(tensor, limit)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for part in tensor.parts:
            if not math.prod(part.sizes):
                continue
            data = bytearray(span(part.sizes, part.strides) * tensor.dtype.itemsize)
            with self._files.open(part.path) as file:
                file.seek(part.offset)
                n = file.readinto(data)
            if n < len(data):
                expected = f"{part.offset + len(data)} bytes or more"
                raise unexpected(expected, part.offset + n, part.path)
            flat = torch.frombuffer(data, dtype=tensor.dtype)
            box = tuple(slice(b, b + n) for b, n in zip(part.starts, part.sizes, strict=True))
            out[box] = flat.as_strided(part.sizes, part.strides)
        return out


def check_size(tensor: StoredTensor, limit: int | None = None) -> None:
    """Raise UnclearError if a companion cannot be read, or takes more than `limit` bytes.

    The default is `MAX_BYTES`.
    """
    if tensor.unread_reason is not None or tensor.decoder is not None:
        raise UnclearError(f"{tensor.name!r} cannot be read")
    sizes = [math.prod(tensor.shape), *(span(part.sizes, part.strides) for part in tensor.parts)]
    nbytes = max(sizes) * tensor.dtype.itemsize
    limit = MAX_BYTES if limit is None else limit
    if nbytes > limit:
        raise UnclearError(f"{tensor.name!r} has {nbytes:,} bytes, {limit:,} at most are read")
