"""Read elements from files in pieces.

Files are not mapped into memory: the pages that were read would count as memory of the process.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from io import BufferedReader
from typing import NamedTuple

import torch

from paramstats._core.states import CHUNK
from paramstats.checkpoints._checksums import Checksums
from paramstats.checkpoints._errors import unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import Box, Decoder, Part, is_dense, span

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after every piece."""

PIECE = 1 << 22
"""Largest piece in bytes: large enough for few calls, small enough for a processor's cache."""

_MAX_GAP = 1 << 16
"""Bytes between two blocks that are read and ignored. A second call would take longer."""

_DECODED = (1 << 15) - 1
"""Values that are decoded at a time: fewer than torch divides among threads. Waking these for every
operator takes longer than they save."""


class Block(NamedTuple):
    """Elements of one part that are read together: a box of it, or a stretch of a dense part."""

    row: int
    """Index of the tensor among those that are read."""
    path: str
    offset: int
    nbytes: int
    """From the first element to the last."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    is_dense: bool
    decoder: Decoder | None = None
    box: Box | None = None
    """The values that the block holds as codes, if there is a decoder."""

    def flattened(self) -> Block:
        """Return a block without gaps as one dimension."""
        return self._replace(sizes=(math.prod(self.sizes),), strides=(1,), is_dense=True)


class Piece(NamedTuple):
    """A byte range of a file, and the blocks in it."""

    path: str
    begin: int
    end: int
    blocks: tuple[Block, ...]


def blocks_of_part(
    row: int, part: Part, dtype: torch.dtype, decoder: Decoder | None = None
) -> Iterator[Block]:
    """Yield a part in blocks of at most a piece; a dense part in memory order and whole chunks."""
    if decoder is not None:
        for box in split_groups((part.starts, part.sizes), [(part, decoder.dtype, decoder)]):
            yield block_of_box(row, part, decoder.dtype, box, decoder)
        return
    numel = math.prod(part.sizes)
    itemsize = dtype.itemsize
    if numel and is_dense(part.sizes, part.strides):
        step = PIECE // itemsize // CHUNK * CHUNK
        for begin in range(0, numel, step):
            n = min(step, numel - begin)
            offset = part.offset + begin * itemsize
            yield Block(row, part.path, offset, n * itemsize, dtype, (n,), (1,), True)
    elif numel:
        for box in split_box((part.starts, part.sizes), [(part, PIECE // itemsize)]):
            yield block_of_box(row, part, dtype, box)


def block_of_box(
    row: int, part: Part, dtype: torch.dtype, box: Box, decoder: Decoder | None = None
) -> Block:
    """Return the block of a part that holds the elements of a box, or their codes."""
    starts, sizes = box
    distances = tuple(start - begin for start, begin in zip(starts, part.starts, strict=True))
    if decoder is not None:
        distances, sizes = codes_of(distances, decoder), codes_of(sizes, decoder)
    first = sum(n * stride for n, stride in zip(distances, part.strides, strict=True))
    offset = part.offset + first * dtype.itemsize
    nbytes = span(sizes, part.strides) * dtype.itemsize
    decoded = None if decoder is None else box
    return Block(
        row, part.path, offset, nbytes, dtype, sizes, part.strides, False, decoder, decoded
    )


def codes_of(sizes: tuple[int, ...], decoder: Decoder) -> tuple[int, ...]:
    """Return how many codes are stored for so many values in each dimension."""
    if decoder.codes == decoder.values:
        return sizes
    d = decoder.dim
    return (*sizes[:d], -(-sizes[d] * decoder.codes // decoder.values), *sizes[d + 1 :])


Side = tuple[Part, torch.dtype, "Decoder | None"]
"""A part of a tensor, the dtype that is stored, and the tensor's decoder."""


def split_groups(box: Box, sides: list[Side]) -> Iterator[Box]:
    """Split a box into whole groups of codes that fit in a piece, in the files of all sides.

    Raises CheckpointError if the box is not made of whole groups, or a group is too large.
    """
    starts, sizes = box
    if not math.prod(sizes):
        return
    group = [1] * len(sizes)
    for part, _, decoder in sides:
        if decoder is not None and decoder.values > 1:
            d = decoder.dim
            first = starts[d] - part.starts[d]
            if first % decoder.values or (
                sizes[d] % decoder.values and first + sizes[d] != part.sizes[d]
            ):
                raise unexpected("parts of whole groups of codes", "a part of one", part.path)
            group[d] = math.lcm(group[d], decoder.values)
    counts = tuple(-(-size // n) for size, n in zip(sizes, group, strict=True))
    limits = [_limit(side, tuple(group)) for side in sides]
    # The order of the first side, which is the one that is decoded in a summary.
    order = sorted(range(len(counts)), key=lambda d: sides[0][0].strides[d])
    strides = [0] * len(counts)
    step = 1
    for d in order:
        strides[d], step = step, step * counts[d]
    numbers = sides[0][0]._replace(strides=tuple(strides))
    limits.append((numbers, max(1, _DECODED // math.prod(group))))
    for first_groups, n_groups in split_box(((0,) * len(counts), counts), limits):
        offsets = [first * n for first, n in zip(first_groups, group, strict=True)]
        ends = [
            min(size, offset + count * n)
            for size, offset, count, n in zip(sizes, offsets, n_groups, group, strict=True)
        ]
        yield (
            tuple(start + offset for start, offset in zip(starts, offsets, strict=True)),
            tuple(end - offset for end, offset in zip(ends, offsets, strict=True)),
        )


def _limit(side: Side, group: tuple[int, ...]) -> tuple[Part, int]:
    """Return a part with the strides of groups, and how many of its elements fit in a piece."""
    part, dtype, decoder = side
    stored = group if decoder is None else codes_of(group, decoder)
    limit = PIECE // dtype.itemsize - span(stored, part.strides) + 1
    if limit < 1:
        raise unexpected("groups of codes near each other", "a group beyond a piece", part.path)
    strides = tuple(n * stride for n, stride in zip(stored, part.strides, strict=True))
    return part._replace(strides=strides), limit


def split_box(box: Box, limits: list[tuple[Part, int]]) -> Iterator[Box]:
    """Split a box until it spans at most so many elements in the memory of each of the parts.

    It is split lazily, because a tensor with gaps can have millions of boxes.
    """
    starts, sizes = box
    for part, limit in limits:
        if max(span(sizes, part.strides), math.prod(sizes)) > limit:
            for smaller in _split(starts, sizes, part.strides, limit):
                yield from split_box(smaller, limits)
            return
    yield box


def _split(
    starts: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...], limit: int
) -> Iterator[Box]:
    """Split a box across the dimension with the largest stride, as little as the limit needs."""
    d = max((d for d, size in enumerate(sizes) if size > 1), key=lambda d: strides[d])
    inner = (*sizes[:d], 1, *sizes[d + 1 :])
    fitting = (limit - span(inner, strides)) // max(strides[d], 1)
    step = max(1, min(fitting, limit // math.prod(inner), sizes[d] - 1))
    for begin in range(0, sizes[d], step):
        n = min(step, sizes[d] - begin)
        first = (*starts[:d], starts[d] + begin, *starts[d + 1 :])
        yield first, (*inner[:d], n, *inner[d + 1 :])


def join_blocks(rows: Iterable[tuple[Block, ...]]) -> Iterator[tuple[Piece, ...]]:
    """Join neighboring blocks to pieces.

    A row has a block of each checkpoint, with the same elements. The pieces that are yielded
    together have the same rows.
    """
    joined: list[tuple[Block, ...]] = []
    ranges: list[tuple[int, int]] = []
    for row in rows:
        extended = [_extended(*of_file) for of_file in zip(row, ranges, strict=False)]
        same_files = joined and all(a.path == b.path for a, b in zip(row, joined[0], strict=True))
        if not same_files or None in extended:
            if joined:
                yield _pieces(joined, ranges)
            joined = []
            extended = [(block.offset, block.offset + block.nbytes) for block in row]
        joined.append(row)
        ranges = [of_file for of_file in extended if of_file is not None]
    if joined:
        yield _pieces(joined, ranges)


def _extended(block: Block, current: tuple[int, int]) -> tuple[int, int] | None:
    """Return a byte range extended by a block, or None if it is too far away or too large."""
    begin, end = current
    new_end = max(end, block.offset + block.nbytes)
    fits = begin <= block.offset <= end + _MAX_GAP and new_end - begin <= PIECE
    return (begin, new_end) if fits else None


def _pieces(rows: list[tuple[Block, ...]], ranges: list[tuple[int, int]]) -> tuple[Piece, ...]:
    return tuple(
        Piece(blocks[0].path, *of_file, blocks)
        for blocks, of_file in zip(zip(*rows, strict=True), ranges, strict=True)
    )


Filled = tuple[tuple[Piece, torch.Tensor], ...]
"""Pieces with their bytes."""


class Reader:
    """Read pieces, the next ones while the caller computes with the current ones.

    There are two buffers for each checkpoint. The pieces are read by one thread, in order.
    """

    def __init__(
        self, files: Files, checkpoints: int = 1, checksums: Sequence[Checksums] = ()
    ) -> None:
        self._files = files
        self._checksums = checksums
        self._space = [[bytearray(PIECE) for _ in range(checkpoints)] for _ in range(2)]
        self._open: list[BufferedReader | None] = [None] * checkpoints

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open:
            if file is not None:
                file.close()

    def read(self, rows: Iterable[tuple[Piece, ...]]) -> Iterator[Filled]:
        """Yield the pieces with their bytes, which are valid until the next iteration."""
        calls = (
            functools.partial(self._read_row, row, buffers)
            for row, buffers in zip(rows, itertools.cycle(self._space))
        )
        thread = _new_thread()
        if thread is None:
            yield from (call() for call in calls)
            return
        with thread:
            current = None
            for call in calls:
                following = thread.submit(call)
                if current is not None:
                    yield current.result()
                current = following
            if current is not None:
                yield current.result()

    def _read_row(self, row: tuple[Piece, ...], buffers: list[bytearray]) -> Filled:
        return tuple((piece, self._read_piece(i, piece, buffers[i])) for i, piece in enumerate(row))

    def _read_piece(self, checkpoint: int, piece: Piece, buffer: bytearray) -> torch.Tensor:
        file = self._open[checkpoint]
        if file is None or file.name != piece.path:
            if file is not None:
                file.close()
            self._open[checkpoint] = file = self._files.open(piece.path)
        size = piece.end - piece.begin
        file.seek(piece.begin)
        n = file.readinto(memoryview(buffer)[:size])
        if n < size:
            raise unexpected(f"{piece.end} bytes or more", piece.begin + n, piece.path)
        if self._checksums:
            data = memoryview(buffer)[:size]
            self._checksums[checkpoint].update(piece.path, piece.begin, data)
        return torch.frombuffer(buffer, dtype=torch.uint8)[:size]


def _new_thread() -> futures.Executor | None:
    """Return a thread that executes calls in order; None while the interpreter exits."""
    try:
        thread = futures.ThreadPoolExecutor(1, "paramstats-reader")
        thread.submit(int)
    except RuntimeError:
        return None
    return thread


def block_view(data: torch.Tensor, piece: Piece, block: Block) -> torch.Tensor:
    """Return the elements of a block, decoded if they are codes, given the bytes of its piece."""
    begin = block.offset - piece.begin
    block_bytes = data[begin : begin + block.nbytes]
    if block_bytes.data_ptr() % block.dtype.itemsize:  # the dtype needs aligned memory
        block_bytes = block_bytes.clone()
    flat = block_bytes.view(block.dtype)
    elements = flat if block.is_dense else flat.as_strided(block.sizes, block.strides)
    if block.decoder is None or block.box is None:
        return elements
    return block.decoder.decode(elements, block.box)
