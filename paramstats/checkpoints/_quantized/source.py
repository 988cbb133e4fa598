"""What the formats share: the companions of a tensor, and the tensor with a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from paramstats.checkpoints._quantized.companions import Companions, Load, UnclearError
from paramstats.checkpoints._quantized.config import Config
from paramstats.checkpoints._quantized.decoders import Packing, ScaledCodes
from paramstats.checkpoints._quantized.grids import FLOATS, Grid, grid_of, to_float
from paramstats.checkpoints._stored_tensors import Part, StoredTensor


@dataclass
class Source:
    """A checkpoint's tensors by name, and the means to read the small ones."""

    tensors: dict[str, StoredTensor]
    companions: Companions
    config: Config
    used: dict[str, str] = field(default_factory=dict)
    """What a companion is, by its name, such as "scale of 'w'"."""
    bitsandbytes: frozenset[str] = frozenset()
    """The names of tensors that have an absmax."""

    def __post_init__(self) -> None:
        self.bitsandbytes = frozenset(
            name.removesuffix(".absmax") for name in self.tensors if name.endswith(".absmax")
        )

    def find(self, name: str, what: str, owner: str) -> StoredTensor | None:
        """Return a companion of `owner`, if there is one."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            self.used[tensor.name] = f"{what} of {owner!r}"
        return tensor

    def need(self, name: str, what: str, owner: str) -> StoredTensor:
        """Return a companion of `owner`; raise UnclearError if there is none."""
        tensor = self.find(name, what, owner)
        if tensor is None:
            raise UnclearError(f"no {what} found")
        return tensor


def make_grid(
    source: Source,
    shape: tuple[int, ...],
    tensor: StoredTensor,
    *,
    like: StoredTensor | None = None,
    groups: dict[int, Load] | None = None,
    convert: Callable[[torch.Tensor], torch.Tensor] = to_float,
) -> Grid:
    """Return a companion as numbers of a tensor's elements.

    `like` is the scale if the companion holds zero points.
    """
    allowed = FLOATS | {torch.float8_e8m0fnu}
    if like is not None:
        allowed = FLOATS | {torch.int8, torch.uint8, torch.int32}
    if tensor.dtype not in allowed:
        raise UnclearError(f"{tensor.name!r} has the dtype {tensor.dtype}")
    if like is not None and tensor.shape != like.shape and math.prod(tensor.shape) != 1:
        raise UnclearError(f"{tensor.name!r} has the shape {list(tensor.shape)}")
    grid, blocks = grid_of(shape, tensor.shape)
    load = source.companions.loader(tensor, lambda x: x.reshape(grid))
    return Grid(load, blocks, groups or {}, convert)


def unpacked_parts(
    tensor: StoredTensor, shape: tuple[int, ...], d: int, packing: Packing
) -> tuple[Part, ...]:
    """Return parts whose sizes count values instead of codes along a dimension."""

    def parts() -> Iterator[Part]:
        for part in tensor.parts:
            first, end = part.starts[d], part.starts[d] + part.sizes[d]
            if first % packing.codes or (end % packing.codes and end != tensor.shape[d]):
                raise UnclearError("parts that divide groups of codes")
            start = first // packing.codes * packing.values
            stop = shape[d] if end == tensor.shape[d] else end // packing.codes * packing.values
            yield part._replace(
                sizes=(*part.sizes[:d], stop - start, *part.sizes[d + 1 :]),
                starts=(*part.starts[:d], start, *part.starts[d + 1 :]),
            )

    return tuple(parts())


def decoded(
    tensor: StoredTensor,
    shape: tuple[int, ...],
    parts: tuple[Part, ...],
    decoder: ScaledCodes,
    text: str,
    weight_name: str = "",
    kind: str = "",
) -> StoredTensor:
    """Return a tensor with a decoder, the shape of its values, and a label that says so."""
    kind = kind or str(tensor.dtype).removeprefix("torch.")
    label = f"values of {kind} codes {text}"
    return tensor._replace(
        shape=shape,
        dtype=torch.float32,
        parts=parts,
        decoder=decoder,
        label=label,
        weight_name=weight_name,
    )
