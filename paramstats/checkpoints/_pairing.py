"""Pair the tensors of two checkpoints by name, and the elements of two tensors by position."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints._errors import unexpected
from paramstats.checkpoints._reading import Block, block_of_box, split_box
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, is_dense

_MAX_PAIRS = 1 << 21
"""Pairs of parts of a tensor that may overlap: rows on 1,448 ranks and columns on as many."""

Pair = tuple[StoredTensor, StoredTensor]


def all_names(tensors: list[StoredTensor]) -> set[str]:
    return {name for tensor in tensors for name in tensor.names}


def without_prefixes(
    all_a: list[StoredTensor], all_b: list[StoredTensor]
) -> tuple[list[StoredTensor], list[StoredTensor], str, str]:
    """Remove a prefix, such as "model." or "module.", from the names of one checkpoint.

    It is the prefix whose removal gives most names in common. Nothing is removed if the checkpoints
    already have a name in common.

    Returns:
        The tensors of a, the tensors of b, the prefix of a, the prefix of b.
    """
    names_a, names_b = all_names(all_a), all_names(all_b)
    if names_a & names_b:
        return all_a, all_b, "", ""
    prefix_a, count_a = _best_prefix(names_a, names_b)
    prefix_b, count_b = _best_prefix(names_b, names_a)
    if count_a >= count_b:
        return _without_prefix(all_a, prefix_a), all_b, prefix_a, ""
    return all_a, _without_prefix(all_b, prefix_b), "", prefix_b


def _best_prefix(prefixed: set[str], plain: set[str]) -> tuple[str, int]:
    """Return the prefix whose removal gives most names of `plain`, and their number."""
    counts: dict[str, int] = {}
    lengths = set(map(len, plain))  # comparing with others would take long for a long name
    for name in prefixed:
        end = name.find(".") + 1
        while end > 0:
            if len(name) - end in lengths and name[end:] in plain:
                counts[name[:end]] = counts.get(name[:end], 0) + 1
            end = name.find(".", end) + 1
    return max(counts.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))


def _without_prefix(tensors: list[StoredTensor], prefix: str) -> list[StoredTensor]:
    return [
        tensor._replace(
            name=tensor.name.removeprefix(prefix),
            aliases=tuple(alias.removeprefix(prefix) for alias in tensor.aliases),
        )
        for tensor in tensors
    ]


def pair_tensors(all_a: list[StoredTensor], all_b: list[StoredTensor]) -> Iterator[Pair]:
    """Yield the tensors with a common name, under the first such name.

    A tied tensor of one checkpoint may be several tensors in the other.
    """
    row_of = {name: row for row, tensor in enumerate(all_b) for name in tensor.names}
    for a in all_a:
        for row in dict.fromkeys(row_of[name] for name in a.names if name in row_of):
            name = next(name for name in a.names if name in all_b[row].names)
            yield a._replace(name=name), all_b[row]


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
