"""Names of two checkpoints that differ by what one wraps around them: `model.`, `module.`, ..."""

from __future__ import annotations

from paramstats.checkpoints._stored import Stored


def aligned(
    all_a: list[Stored], all_b: list[Stored]
) -> tuple[list[Stored], list[Stored], str, str]:
    """Both without the prefix that keeps their names apart, and the prefixes of each.

    Only where they have no name in common; of several prefixes the one that brings most together.
    """
    names_a, names_b = _names(all_a), _names(all_b)
    if names_a & names_b:
        return all_a, all_b, "", ""
    prefix_a, count_a = _best(names_a, names_b)
    prefix_b, count_b = _best(names_b, names_a)
    if count_a >= count_b:
        return _without(all_a, prefix_a), all_b, prefix_a, ""
    return all_a, _without(all_b, prefix_b), "", prefix_b


def _names(tensors: list[Stored]) -> set[str]:
    return {name for tensor in tensors for name in tensor.names}


def _best(wrapped: set[str], bare: set[str]) -> tuple[str, int]:
    """The prefix without which most names are among `bare`, and how many."""
    counts: dict[str, int] = {}
    for name in wrapped:
        at = name.find(".") + 1
        while at > 0:
            if name[at:] in bare:
                counts[name[:at]] = counts.get(name[:at], 0) + 1
            at = name.find(".", at) + 1
    return max(counts.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))


def _without(tensors: list[Stored], prefix: str) -> list[Stored]:
    return [
        tensor._replace(
            name=tensor.name.removeprefix(prefix),
            aliases=tuple(alias.removeprefix(prefix) for alias in tensor.aliases),
        )
        for tensor in tensors
    ]
