"""Pair the elements of two tensors by position."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints._errors import unexpected
from paramstats.checkpoints._reading import Block, block_of_box, split_box
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, is_dense

_MAX_PAIRS = 1 << 21
"""Pairs of parts of a tensor that may overlap: rows on 1,448 ranks and columns on as many."""

NOT_COMPARED = "not compared: "
"""What the reason begins with if tensors could be read, but not compared."""


def why_uncompared(a: StoredTensor, b: StoredTensor) -> str:
    """Return why two tensors cannot be compared, or an empty text."""
    unread = [
        f"{x.unread_reason} (in {side})" for side, x in (("a", a), ("b", b)) if x.unread_reason
    ]
    codes = [f"{x.label} (in {side})" for side, x in (("a", a), ("b", b)) if x.is_codes]
    return "; ".join(unread) or (NOT_COMPARED + "; ".join(codes) if codes else "")


def pair_blocks(row: int, a: StoredTensor, b: StoredTensor) -> Iterator[tuple[Block, Block]]:
    """Yield blocks of two tensors of one shape that hold the elements at the same positions."""
    for x, y in pair_parts(a.parts, b.parts):
        starts = tuple(map(max, x.starts, y.starts))
        sizes = tuple(
            min(s + n, t + m) - start
            for s, n, t, m, start in zip(x.starts, x.sizes, y.starts, y.sizes, starts, strict=True)
        )
        if any(size <= 0 for size in sizes):
            continue
        if a.decoder is not None or b.decoder is not None:
            of_a, of_b = (x, a.stored_dtype), (y, b.stored_dtype)
            sides = [(*of_a, a.decoder), (*of_b, b.decoder)]
            for box in reading.split_groups((starts, sizes), sides):
                block_a = block_of_box(row, *of_a, box, a.decoder)
                yield block_a, block_of_box(row, *of_b, box, b.decoder)
            continue
        # Where both are dense and in the same order, the order does not matter. Blocks are then
        # flattened, which is faster. Most checkpoints are stored like this.
        same_order = is_dense(sizes, x.strides) and all(
            n == 1 or s == t for n, s, t in zip(sizes, x.strides, y.strides, strict=True)
        )
        limits = [(x, reading.PIECE // a.dtype.itemsize), (y, reading.PIECE // b.dtype.itemsize)]
        for box in split_box((starts, sizes), limits):
            block_a = block_of_box(row, x, a.dtype, box)
            block_b = block_of_box(row, y, b.dtype, box)
            yield (block_a.flattened(), block_b.flattened()) if same_order else (block_a, block_b)


def pair_parts(parts_a: tuple[Part, ...], parts_b: tuple[Part, ...]) -> Iterator[tuple[Part, Part]]:
    """Yield all pairs of parts that share elements, and few others.

    Tensors can have thousands of parts, so not every pair is tried.
    """
    by_box = {(b.starts, b.sizes): b for b in parts_b}
    unpaired = []
    for a in parts_a:
        b = by_box.pop((a.starts, a.sizes), None)
        if b is None:
            unpaired.append(a)
        else:  # the same box: no other part shares its elements
            yield a, b
    if not unpaired or not by_box:
        return
    starts = list(zip(*(b.starts for b in by_box.values()), strict=True))
    d = max(range(len(starts)), key=lambda d: len(set(starts[d])))
    candidates = sorted(by_box.values(), key=lambda b: b.starts[d])
    begins = [b.starts[d] for b in candidates]
    longest = max(b.sizes[d] for b in candidates)
    left = _MAX_PAIRS
    for a in unpaired:
        first = bisect.bisect_right(begins, a.starts[d] - longest)
        last = bisect.bisect_left(begins, a.starts[d] + a.sizes[d])
        left -= max(0, last - first)
        if left < 0:
            raise unexpected(f"at most {_MAX_PAIRS:,} pairs of parts of a tensor", "more", a.path)
        for b in candidates[first:last]:
            yield a, b
