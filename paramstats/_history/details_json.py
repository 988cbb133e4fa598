"""Write the details of a record as a JSON object; parse and check such an object."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Callable, Mapping
from operator import add
from typing import Any

from paramstats._core import moments
from paramstats._core.details import (
    NOT_KNOWN,
    ROW_STATE,
    ROWS_HEAD,
    ZERO_ROWS_HEAD,
    Detail,
    Distribution,
)
from paramstats._core.moments import NAN, Moments, finite_count
from paramstats._core.record import Record
from paramstats._history.state_columns import expect, is_between, json_text, list_of

_KINDS = ("params", "grads")
_WORDS_OF_ROW = ROW_STATE.size // 8
_IN_FILE_NOT_KNOWN = "not known"
_IS_NEGATIVE = (0.0).__gt__
"""Faster than a lambda; false for NaN."""


def details_text(record: Record) -> str:
    """Return the JSON object for a record's details; empty without any.

    It leaves out what does not fit the state of the same tensor, because another thread changed the
    tensor between the two reads. No tensor has both, so that `parse_details` would refuse the line.
    """
    content: dict[str, dict[str, dict[str, Any]]] = {}
    names = record.layout.names
    for row, detail in sorted(record.details.items()):
        is_grad, tensor = divmod(row, len(names))
        for what, data in zip(Detail._fields, detail, strict=True):
            if data is not None and _IS_POSSIBLE[what](data, record.state(row)):
                of_kind = content.setdefault(what, {}).setdefault(_KINDS[is_grad], {})
                of_kind[names[tensor]] = _WRITERS[what](data)
    return json_text(content) if content else ""


def parse_details(content: Any, names: tuple[str, ...], states: list[Moments]) -> dict[int, Detail]:
    """Return the details in a parsed object; raises an error if a value is not valid.

    Args:
        content: the object.
        names: the names of the tensors.
        states: the states of the tensors, then those of their gradients.
    """
    _expect_object(content, "details")
    rows = {name: row for row, name in enumerate(names)}
    out: dict[int, Detail] = {}
    for what in Detail._fields:
        by_kind = content.get(what, {})
        _expect_object(by_kind, what)
        for begin, kind in zip((0, len(names)), _KINDS, strict=True):
            by_name = by_kind.get(kind, {})
            _expect_object(by_name, what)
            for name, value in by_name.items():
                row = begin + rows[name]
                data = _PARSERS[what](value, states[row])
                expect(_IS_POSSIBLE[what](data, states[row]), f"a tensor's {what}", value)
                out[row] = out.get(row, Detail())._replace(**{what: data})
    return out


def _expect_object(content: Any, what: str) -> None:
    expect(type(content) is dict, f"an object for {what}", content)


# ---- distributions

_FLOATS = ("mean", "m2", "m3", "m4", "abs_mean")


def _distribution_content(data: bytes) -> dict[str, Any]:
    content = Distribution.unpack(data)._asdict()
    del content["n"]  # known from the state
    return content


def _parse_distribution(content: Any, state: Moments) -> bytes:
    _expect_object(content, "distribution")
    first, signs = content["first"], (content["negative"], content["positive"])
    negative, positive = (tuple(list_of(int, counts, "counts")) for counts in signs)
    floats = {name: NAN if content[name] is None else content[name] for name in _FLOATS}
    mx = tuple(list_of(int, content["mx"], "mx", len(Distribution().mx)))
    expect(type(first) is int, "an exponent", first)
    one = Distribution(first, negative, positive, finite_count(state), mx=mx, **floats)
    return one.pack()  # raises an error for values of other types


def _is_distribution(data: bytes, state: Moments) -> bool:
    """Return whether a tensor with this state may have this distribution."""
    one = Distribution.unpack(data)
    counts, pairs = one.negative + one.positive, zip(one.mx[::2], one.mx[1::2], strict=True)
    nonzero = sum(counts)
    return (
        not moments.is_unread(state)
        and one.n == finite_count(state)
        and nonzero == one.n - state.zeros
        and min(counts + one.mx, default=0) >= 0
        and all(underflow + overflow <= nonzero for underflow, overflow in pairs)
        and one.first >= -1074
        and one.first + len(one.positive) <= 1024
        and not (one.m2 < 0 or one.m4 < 0 or one.abs_mean < 0)
        and (one.n == 0 or is_between(state.min, one.mean, state.max))
    )


# ---- rows


def _rows_content(data: bytes) -> list[Any]:
    _, row_numel = ROWS_HEAD.unpack_from(data)
    return [row_numel, _encoded(_little_endian(data[ROWS_HEAD.size :]))]


def _parse_rows(content: Any, state: Moments) -> bytes:
    row_numel, text = list_of(object, content, "rows", 2)
    expect(type(row_numel) is int, "a number of elements", row_numel)
    data = _little_endian(_decoded(text))
    expect(len(data) % ROW_STATE.size == 0, f"{ROW_STATE.size} bytes for each row", len(data))
    return ROWS_HEAD.pack(len(data) // ROW_STATE.size, row_numel) + data


def _is_rows(data: bytes, state: Moments) -> bool:
    """Return whether a tensor with this state may have these rows."""
    rows, row_numel = map(int, ROWS_HEAD.unpack_from(data))
    words = data[ROWS_HEAD.size :]
    # Columns of all rows: an embedding has many.
    _, m2, abs_max = (array("d", words)[i::_WORDS_OF_ROW] for i in range(3))
    zeros, nonfinite = (array("q", words)[i::_WORDS_OF_ROW] for i in (3, 4))
    return (
        not moments.is_unread(state)
        and len(words) == rows * ROW_STATE.size
        and rows * row_numel == state.count > 0
        and min(zeros) >= 0 <= min(nonfinite)
        and max(map(add, zeros, nonfinite)) <= row_numel
        and sum(zeros) == state.zeros
        and sum(nonfinite) == state.count - finite_count(state)
        and not any(map(_IS_NEGATIVE, m2))
        and not any(map(_IS_NEGATIVE, abs_max))
    )


# ---- zero rows


def _zero_rows_content(data: bytes) -> Any:
    if data == NOT_KNOWN:
        return _IN_FILE_NOT_KNOWN
    return [*ZERO_ROWS_HEAD.unpack_from(data), _encoded(data[ZERO_ROWS_HEAD.size :])]


def _parse_zero_rows(content: Any, state: Moments) -> bytes:
    if content == _IN_FILE_NOT_KNOWN:
        return NOT_KNOWN
    rows, text = list_of(object, content, "zero_rows", 2)
    expect(type(rows) is int, "a number of rows", rows)
    return ZERO_ROWS_HEAD.pack(rows) + _decoded(text)


def _is_zero_rows(data: bytes, state: Moments) -> bool:
    """Return whether a tensor with this state may have these zero rows."""
    if moments.is_unread(state) or data == NOT_KNOWN:
        return not moments.is_unread(state)
    rows, bits = int(*ZERO_ROWS_HEAD.unpack_from(data)), data[ZERO_ROWS_HEAD.size :]
    is_zero = int.from_bytes(bits, "little")
    return (
        len(bits) == (rows + 7) // 8
        and 0 < is_zero.bit_length() <= rows
        and state.count % rows == 0 < state.count
        and is_zero.bit_count() * (state.count // rows) <= state.zeros
    )


# ---- bytes


def _little_endian(data: bytes) -> bytes:
    """Return words of 8 bytes of this machine's byte order in that of files, or the reverse."""
    words = array("Q", data)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(text: Any) -> bytes:
    expect(type(text) is str, "base64", text)
    return base64.b64decode(text, validate=True)


_WRITERS: Mapping[str, Callable[[bytes], Any]] = {
    "distribution": _distribution_content,
    "rows": _rows_content,
    "zero_rows": _zero_rows_content,
}
_PARSERS: Mapping[str, Callable[[Any, Moments], bytes]] = {
    "distribution": _parse_distribution,
    "rows": _parse_rows,
    "zero_rows": _parse_zero_rows,
}
_IS_POSSIBLE: Mapping[str, Callable[[bytes, Moments], bool]] = {
    "distribution": _is_distribution,
    "rows": _is_rows,
    "zero_rows": _is_zero_rows,
}
