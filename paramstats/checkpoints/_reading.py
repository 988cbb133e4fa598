"""Reads elements from files piece by piece: the next piece is on its way while one is worked on.

No file is mapped into memory: the kernel would count every page that was looked at as the
process's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple

import torch

from paramstats._core.reference import CHUNK
from paramstats.checkpoints._stored import CheckpointError, Part, is_dense, span

PIECE = 1 << 22
"""Bytes read in one go: few calls, and what was read is in a processor's cache when it is looked
at."""

_GAP = 1 << 16
"""Bytes between tensors that are read along rather than left out with a call of their own."""


class Run(NamedTuple):
    """Elements that are read in one go: a box of a part, or a run of a dense one."""

    part: int
    """The position of the part among those that are read."""
    path: str
    offset: int
    nbytes: int
    """From the first element to the last."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    is_dense: bool


class Piece(NamedTuple):
    """Runs that lie close to each other in a file."""

    path: str
    begin: int
    end: int
    runs: tuple[Run, ...]


def runs_of(index: int, part: Part, dtype: torch.dtype) -> Iterator[Run]:
    """A part in runs of at most a piece: a dense one in memory order, in whole chunks."""
    numel = math.prod(part.sizes)
    itemsize = dtype.itemsize
    if numel and is_dense(part.sizes, part.strides):
        step = PIECE // itemsize // CHUNK * CHUNK
        for begin in range(0, numel, step):
            n = min(step, numel - begin)
            at = part.offset + begin * itemsize
            yield Run(index, part.path, at, n * itemsize, dtype, (n,), (1,), True)
    elif numel:
        for box in boxes(part.starts, part.sizes, [(part, PIECE // itemsize)]):
            yield run_of(index, part, dtype, box)


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Some of a tensor's elements: where they begin in it, and how many."""


def run_of(index: int, part: Part, dtype: torch.dtype, box: Box) -> Run:
    """The run that is a box of a part, from the first element of it to the last."""
    starts, sizes = box
    first = sum(
        (start - begin) * stride
        for start, begin, stride in zip(starts, part.starts, part.strides, strict=True)
    )
    at = part.offset + first * dtype.itemsize
    nbytes = span(sizes, part.strides) * dtype.itemsize
    return Run(index, part.path, at, nbytes, dtype, sizes, part.strides, False)


def boxes(
    starts: tuple[int, ...], sizes: tuple[int, ...], parts: list[tuple[Part, int]]
) -> Iterator[Box]:
    """A box cut until its elements lie, in each of the parts, within as many as are given for it.

    It is cut across the dimension where they lie farthest apart.
    """
    waiting = [iter([(starts, sizes)])]  # lazily: of a tensor with gaps there may be millions
    while waiting:
        box = next(waiting[-1], None)
        if box is None:
            waiting.pop()
            continue
        _, sizes = box
        too_far = next(
            (
                (part.strides, most)
                for part, most in parts
                if max(span(sizes, part.strides), math.prod(sizes)) > most
            ),
            None,
        )
        if too_far is None:
            yield box
        else:
            waiting.append(_cut(box, *too_far))


def _cut(box: Box, strides: tuple[int, ...], most: int) -> Iterator[Box]:
    starts, sizes = box
    d = max((d for d, size in enumerate(sizes) if size > 1), key=lambda d: strides[d])
    inner = (*sizes[:d], 1, *sizes[d + 1 :])
    apart = (most - span(inner, strides)) // max(strides[d], 1)
    step = max(1, min(apart, most // math.prod(inner), sizes[d] - 1))
    for begin in range(0, sizes[d], step):
        n = min(step, sizes[d] - begin)
        at = (*starts[:d], starts[d] + begin, *starts[d + 1 :])
        yield at, (*inner[:d], n, *inner[d + 1 :])


def pieces(rows: Iterable[tuple[Run, ...]]) -> Iterator[tuple[Piece, ...]]:
    """Runs joined to pieces; of two checkpoints that are read in step, in each of them alike."""
    joined: list[list[Run]] = []
    places: list[tuple[int, int]] = []
    for row in rows:
        further = [_further(*at) for at in zip(row, joined, places, strict=False)]
        if joined and None in further:
            yield _pieces(joined, places)
            joined = []
        if joined:
            places = [place for place in further if place is not None]
        else:
            joined = [[] for _ in row]
            places = [(run.offset, run.offset + run.nbytes) for run in row]
        for runs, run in zip(joined, row, strict=True):
            runs.append(run)
    if joined:
        yield _pieces(joined, places)


def _further(run: Run, joined: list[Run], place: tuple[int, int]) -> tuple[int, int] | None:
    """The bytes of a piece with one run more; None where that is too many or too far."""
    begin, end = place
    past = max(end, run.offset + run.nbytes)
    near = begin <= run.offset <= end + _GAP and past - begin <= PIECE
    return (begin, past) if near and run.path == joined[0].path else None


def _pieces(joined: list[list[Run]], places: list[tuple[int, int]]) -> tuple[Piece, ...]:
    return tuple(
        Piece(runs[0].path, *place, tuple(runs)) for runs, place in zip(joined, places, strict=True)
    )


Read = tuple[tuple[Piece, torch.Tensor], ...]
"""Pieces with their bytes."""


class Reader:
    """Pieces of files in memory, read by a thread of its own into two buffers in turn; of `files`
    checkpoints in step."""

    def __init__(self, files: int = 1) -> None:
        self._buffers = [[_buffer() for _ in range(files)] for _ in range(2)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="paramstats-read")
        self._open: list[IO[bytes] | None] = [None] * files

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        for file in self._open:
            if file is not None:
                file.close()

    def read(self, wanted: Iterable[tuple[Piece, ...]]) -> Iterator[Read]:
        """The pieces with their bytes, which are good until the next ones are asked for."""
        ahead: Future[Read] | None = None
        for turn, row in enumerate(wanted):
            coming = self._thread.submit(self._fill, row, turn % 2)
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()

    def _fill(self, row: tuple[Piece, ...], turn: int) -> Read:
        return tuple(
            (piece, _filled(piece, self._file(i, piece.path), *self._buffers[turn][i]))
            for i, piece in enumerate(row)
        )

    def _file(self, position: int, path: str) -> IO[bytes]:
        file = self._open[position]
        if file is None or file.name != path:
            if file is not None:
                file.close()
            self._open[position] = file = open(path, "rb", buffering=0)  # noqa: SIM115
        return file


def _buffer() -> tuple[memoryview, torch.Tensor]:
    memory = bytearray(PIECE)
    return memoryview(memory), torch.frombuffer(memory, dtype=torch.uint8)


def _filled(
    piece: Piece, file: IO[bytes], memory: memoryview, tensor: torch.Tensor
) -> torch.Tensor:
    size = piece.end - piece.begin
    done = 0
    file.seek(piece.begin)
    while done < size:
        got = file.readinto(memory[done:size])  # type: ignore[attr-defined]  # as all raw files do
        if not got:
            raise CheckpointError(
                f"paramstats: expected {piece.end} bytes or more, got {piece.begin + done} in "
                f"{piece.path}: it was cut off meanwhile"
            )
        done += got
    return tensor[:size]


def view(data: torch.Tensor, piece: Piece, run: Run) -> torch.Tensor:
    """The elements of a run in the bytes of its piece."""
    at = run.offset - piece.begin
    here = data[at : at + run.nbytes]
    if here.data_ptr() % run.dtype.itemsize:  # not aligned as the first of the piece
        here = here.clone()
    flat = here.view(run.dtype)
    return flat if run.is_dense else flat.as_strided(run.sizes, run.strides)
