"""Convert the codes of quantized weights to values."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from paramstats.checkpoints._quantized.grids import Numbers
from paramstats.checkpoints._stored_tensors import Box


@dataclass(frozen=True)
class Packing:
    """How the integers of a group are packed in stored elements, the lowest bits first."""

    bits: int
    positions: tuple[int, ...]
    """The first bit of each integer, counted from the first bit of the group."""
    width: int
    """Bits of a stored element."""

    @property
    def values(self) -> int:
        return len(self.positions)

    @property
    def codes(self) -> int:
        return self.values * self.bits // self.width

    def unpack(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        """Return the first `count` integers along the last dimension."""
        missing = -packed.shape[-1] % self.codes
        if missing:
            packed = torch.nn.functional.pad(packed, (0, missing))
        groups = packed.unflatten(-1, (-1, self.codes))
        mask = (1 << self.bits) - 1
        shifts = _shifts(self, packed.dtype)
        if self.codes == 1:
            unpacked = (groups >> shifts).bitwise_and_(mask)
        else:
            words = [position // self.width for position in self.positions]
            unpacked = (groups[..., words] >> shifts).bitwise_and_(mask)
            for i, shift in enumerate(shifts.tolist()):
                low = self.width - shift
                if low < self.bits:  # the rest is in the next element
                    high = groups[..., words[i] + 1] << low
                    unpacked[..., i] = (unpacked[..., i] & ((1 << low) - 1)) | (high & mask)
        integers: torch.Tensor = unpacked.flatten(-2)[..., :count]
        return integers


def in_order(bits: int, width: int) -> Packing:
    """Return a packing of integers one after the other, without unused bits."""
    values = width // math.gcd(bits, width)
    return Packing(bits, tuple(range(0, values * bits, bits)), width)


@dataclass(frozen=True)
class ScaledCodes:
    """Values are (code - zero) * scale; the codes may be packed, or indexes of a table."""

    dtype: torch.dtype
    scale: Numbers
    zero: Numbers | int = 0
    packing: Packing | None = None
    dim: int = 0
    """The dimension along which the codes are packed."""
    table: torch.Tensor | None = None

    @property
    def codes(self) -> int:
        return 1 if self.packing is None else self.packing.codes

    @property
    def values(self) -> int:
        return 1 if self.packing is None else self.packing.values

    @property
    def _has_pairs(self) -> bool:
        """Whether each byte holds two codes, whose values do not depend on their position."""
        halves = (self.packing or in_order(8, 8)).positions
        in_bytes = halves[:2] == (4, 0) or halves == tuple(range(0, 4 * len(halves), 4))
        return in_bytes and isinstance(self.zero, int)

    @functools.cached_property
    def _pairs(self) -> torch.Tensor:
        """The values of the two codes in each byte."""
        table = self.table
        if table is None:
            table = torch.arange(16, dtype=torch.float32, device="cpu")
            table = table - (self.zero if isinstance(self.zero, int) else 0)
        low, high = table.repeat(16), table.repeat_interleave(16)
        is_high_first = self.packing is not None and self.packing.positions[0] == 4
        return torch.stack((high, low) if is_high_first else (low, high), -1)

    def decode(self, codes: torch.Tensor, box: Box) -> torch.Tensor:
        """Return the values in a box, given their codes."""
        if self.packing is not None:
            count = box[1][self.dim]
            if self._has_pairs and codes.stride(self.dim) == 1 and self.dim == codes.dim() - 1:
                pairs = look_up(self._pairs, codes.contiguous().view(torch.uint8))
                return pairs.flatten(-2)[..., :count] * self.scale.of(box)
            codes = self.packing.unpack(codes.movedim(self.dim, -1), count).movedim(-1, self.dim)
        scale = self.scale.of(box)
        if self.table is not None:
            values = look_up(self.table, codes).to(scale.dtype)
        else:
            values = codes.to(scale.dtype)
        if isinstance(self.zero, int):
            if self.zero:
                values = values - self.zero
        else:
            values = values - self.zero.of(box).to(scale.dtype)
        return values * scale


def look_up(table: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
    """Return the rows of a table. This is faster than indexing, and than converting float8."""
    flat = indexes.reshape(-1).to(torch.int32)
    return table.index_select(0, flat).view(*indexes.shape, *table.shape[1:])


@functools.lru_cache(32)
def _shifts(packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    shifts = [position % packing.width for position in packing.positions]
    return torch.tensor(shifts, dtype=dtype, device="cpu")
