"""Match names of tensors that differ in what they begin with.

A head is "model." in one of the checkpoints and nothing in the other, or "language_model.model." in
one and "model.language_model." in the other. Time and memory are in proportion to the length of the
names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from paramstats.checkpoints._stored_tensors import StoredTensor

_MAX_HEAD = 8
"""Parts of a name that are tried as its head."""

_MAX_TAILS = 1 << 20
"""Tails of names that are kept at a time."""

_MAX_TAIL_LENGTH = 1 << 26
"""Their length in all."""

_MAX_CANDIDATES = 8
"""Tensors with one tail, such as "mlp.weight", beyond which it says nothing about a tensor."""

_MAX_TRIES = 20
"""Heads that are tried for a name of a, on average."""

_USUAL_HEADS = {"model.", "state_dict.", "model_state_dict.", "state_dict.model."}
"""Heads that are preferred to others with as many names, such as "ema."."""

_NUMBER = re.compile(r"\d+")


class Entry(NamedTuple):
    """A name of a tensor."""

    name: str
    renamed: str
    """The name after explicit mappings."""
    key: str
    """What is compared with other names: `renamed`, later without the parts of wrappers."""
    row: int
    tensor: StoredTensor


class Match(NamedTuple):
    a: Entry
    b: Entry
    heads: tuple[str, str] = "", ""
    """What the keys begin with before the part that they share."""


def may_be_one(a: Entry, b: Entry) -> bool:
    return (a.tensor.group == "optimizer") == (b.tensor.group == "optimizer")


def by_head(all_a: list[Entry], all_b: list[Entry], ambiguous: list[Match]) -> list[Match]:
    """Return the matches of names that differ in what they begin with.

    Each name of a votes for the heads of names in b that share most with it. The heads with most
    votes come first. A name that two of them, with as many votes, give different partners is added
    to `ambiguous`.
    """
    voters: dict[tuple[str, str], list[Match]] = {}
    votes: Counter[tuple[str, str]] = Counter()
    for a, candidates in _candidates(all_a, all_b):
        for heads, b in candidates:
            voters.setdefault(heads, []).append(Match(a, b, heads))
            # A vote for tensors of one group is worth more: a model's, not those of its average.
            votes[heads] += 3 if a.tensor.group == b.tensor.group else 2
    names_of = _names_by_head(all_a, {head for head, _ in votes})
    keys_b = {b.key: b for b in all_b}
    done_a: set[str] = set()
    done_b: set[str] = set()
    matches: list[Match] = []
    left = _MAX_TRIES * len(all_a)
    for several in _levels(votes):
        claims = []
        for heads in several:
            names = names_of[heads[0]]
            left -= len(names)
            # There can be as many heads as names. Then only names that voted for them are tried.
            found = _with_heads(names, keys_b, heads) if left > 0 else voters[heads]
            claims += [m for m in found if m.a.key not in done_a and m.b.key not in done_b]
        claims_a = Counter(match.a.key for match in claims)
        claims_b = Counter(match.b.key for match in claims)
        for match in claims:
            done_a.add(match.a.key)
            done_b.add(match.b.key)
            is_only = claims_a[match.a.key] == claims_b[match.b.key] == 1
            (matches if is_only else ambiguous).append(match)
    return matches


def _levels(votes: Counter[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield groups of heads between which nothing decides: first those with most votes.

    Of as many votes, the usual heads come first, then the shortest.
    """
    groups: dict[tuple[int, bool, int], list[tuple[str, str]]] = {}
    for heads, n in votes.items():
        is_unusual = _USUAL_HEADS.isdisjoint(heads)
        length = sum(head.count(".") for head in heads)
        groups.setdefault((-n, is_unusual, length), []).append(heads)
    yield from (groups[key] for key in sorted(groups))


def _with_heads(
    all_a: list[Entry], keys_b: Mapping[str, Entry], heads: tuple[str, str]
) -> Iterator[Match]:
    """Yield the matches of names that begin with a head with those that have another instead."""
    for a in all_a:
        b = keys_b.get(heads[1] + a.key[len(heads[0]) :])
        if b is not None and _may_follow(a, b, *heads):
            yield Match(a, b, heads)


def _may_follow(a: Entry, b: Entry, head_a: str, head_b: str) -> bool:
    """Return whether two names that are equal after these heads may be of one tensor."""
    if not may_be_one(a, b):
        return False
    if not head_a or not head_b:
        return True
    # Such as "weight", which many names end with.
    is_short = "." not in a.key[len(head_a) :]
    return not is_short and a.tensor.shape == b.tensor.shape


def _candidates(
    all_a: list[Entry], all_b: list[Entry]
) -> Iterator[tuple[Entry, list[tuple[tuple[str, str], Entry]]]]:
    """Yield each name of a with the names of b that have another head and the same tail.

    Only tensors of one shape are candidates. Each comes with the heads before the tail.
    """
    limit = min(_max_head(all_a), _max_head(all_b))
    by_tail: dict[str, list[tuple[str, Entry]]] = {}
    for b in all_b:
        for head, tail in _splits(b.key, limit):
            several = by_tail.setdefault(tail, [])
            if len(several) <= _MAX_CANDIDATES:
                several.append((head, b))
    for a in all_a:
        candidates = []
        for head_a, tail in _splits(a.key, limit):
            found = by_tail.get(tail, [])
            if len(found) > _MAX_CANDIDATES:
                break
            candidates += [
                ((head_a, head_b), b)
                for head_b, b in found
                if _may_follow(a, b, head_a, head_b)
                and a.tensor.shape == b.tensor.shape
                and _last_part(head_a) != _last_part(head_b)  # else there is a longer tail
            ]
        yield a, candidates


def _last_part(head: str) -> str:
    """Return the last part of a head with any number in it as 0; other layers are not tried."""
    return _NUMBER.sub("0", head[head.rfind(".", 0, -1) + 1 :])


def _max_head(entries: list[Entry]) -> int:
    """Return how many parts of each name are tried as its head, so that memory is bounded."""
    length = sum(len(entry.key) for entry in entries)
    limits = _MAX_HEAD, _MAX_TAILS // max(len(entries), 1), _MAX_TAIL_LENGTH // max(length, 1)
    return max(1, min(limits))


def _splits(key: str, limit: int) -> Iterator[tuple[str, str]]:
    """Yield (head, tail) for heads of 0, 1, ... up to `limit` parts; the tail is not empty."""
    end = 0
    for _ in range(limit + 1):
        yield key[:end], key[end:]
        end = key.find(".", end) + 1
        if not 0 < end < len(key):
            return


def _names_by_head(entries: list[Entry], heads: Iterable[str]) -> dict[str, list[Entry]]:
    """Return the names that begin with each of the heads."""
    limit = max((head.count(".") for head in heads), default=0)
    known, names_of = set(heads), dict[str, list[Entry]]()
    for entry in entries:
        for head, _ in _splits(entry.key, limit):
            if head in known:
                names_of.setdefault(head, []).append(entry)
    return names_of
