"""Select names by regular expressions, and explain names that do not exist."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from paramstats._core.format import one_line_name

Patterns = tuple[re.Pattern[str], ...]

_MAX_COMPARED = 500
"""Maximum number of names that are compared with one that does not exist."""


def passes(forms: Sequence[str], include: Patterns | None, exclude: Patterns) -> bool:
    """Return whether `include` and `exclude` select a name.

    Args:
        forms: the name, and its full form under wrappers if there are any.
        include: one of these patterns must be found in one of the forms; None: no condition.
        exclude: none of these patterns may be found in any of the forms.
    """
    if include is not None and not any(p.search(form) for p in include for form in forms):
        return False
    return not any(p.search(form) for p in exclude for form in forms)


def no_such_name(name: object, known: Collection[str], count: int) -> str:
    """Return the text of a KeyError, with the most similar of the `known` names.

    Args:
        name: the name that was looked up.
        known: all names, aliases included.
        count: the number of tensors.
    """
    if not isinstance(name, str):
        return f"expected the name of a parameter, got {name!r}"
    prefix = f"{name}."
    if any(other.startswith(prefix) for other in known):
        return (
            f"{name!r} is a module, not a parameter; the names of its parameters match "
            f"r'^{one_line_name(re.escape(name))}\\.'"
        )
    close = difflib.get_close_matches(name, _candidates(name, known), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no parameter {name!r} among {count}{hint}"


def _candidates(name: str, known: Collection[str]) -> Collection[str]:
    """Return all names or, of many, some that are likely to be meant.

    These are names that differ in one part, or have more parts in front. Comparing 100,000 names in
    full would take seconds.
    """
    if len(known) <= _MAX_COMPARED:
        return known
    parts = name.split(".")
    forms = (
        "\\.".join("[^.]*" if i == other else re.escape(part) for i, part in enumerate(parts))
        for other in range(len(parts))
    )
    differs_in_one_part = re.compile("|".join(forms)).fullmatch
    suffix = f".{name}"
    likely = (other for other in known if other.endswith(suffix) or differs_in_one_part(other))
    return list(itertools.islice(likely, _MAX_COMPARED)) or list(
        itertools.islice(known, _MAX_COMPARED)
    )


def compile_patterns(patterns: Any, argument: str) -> Patterns:
    """Return one regular expression or several as a tuple of compiled ones.

    Raises TypeError or re.error, which name `argument`, for anything else.
    """
    several = [patterns] if isinstance(patterns, (str, re.Pattern)) else patterns
    if not isinstance(several, Iterable):
        raise TypeError(
            f"paramstats.summarize: expected a regular expression or several for {argument}, "
            f"got {type(patterns).__name__}"
        )
    try:
        return tuple(re.compile(p) for p in several)
    except (re.error, TypeError) as error:
        raise type(error)(
            f"paramstats.summarize: expected regular expressions for {argument}, "
            f"got {patterns!r}: {one_line_name(str(error))}"
        ) from None
