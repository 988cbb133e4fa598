"""Walk over the values of a pickle, and name them with dotted words.

This is the only walk: torch.save files, TorchScript archives and plain pickles all use it. It
descends into containers, and into the attributes and arguments of objects of any class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles.instructions import FileBytes
from paramstats.checkpoints._pickles.machine import Global, Key, RecordedCall
from paramstats.checkpoints._pickles.sizes import MAX_DIMENSIONS, MAX_SIZE
from paramstats.checkpoints._pickles.storages import Storage
from paramstats.checkpoints._pickles.tensors import HAVE_ATTRIBUTES, Inside
from paramstats.checkpoints._stored_tensors import StoredTensor

_MAX_DEPTH = 1000
_MAX_NAME_LENGTH = 100_000
_MAX_WORD_LENGTH = 1000

_SLOT = 24
_NAME = 150
"""Bytes of memory of a name of a tensor or container, beyond those of the text."""

_MODULE_DICTS = frozenset({"_modules", "_parameters", "_buffers"})
"""Attributes of a module whose names are not in the names of its parameters."""

_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
_BUILTINS = ("builtins", "__builtin__")
_PLAIN = frozenset(
    {
        *(f"{m}.{n}" for m in _BUILTINS for n in ("set", "frozenset", "list", "dict", "tuple")),
        *(f"{m}.{n}" for m in _BUILTINS for n in ("bytearray", "bytes", "complex", "slice")),
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *("numpy.dtype", "_codecs.encode", "collections.deque", "torch.device"),
        *("argparse.Namespace", "types.SimpleNamespace"),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *_MAPPINGS,
    }
)
"""Classes and functions whose results are plain data: no note names them, and they are visited
wherever they occur."""

_SMALL_BYTES = 64
"""Bytes that an object may hold without being named in a note: those of a date, for example."""

_Child = tuple["str | None", Any]
"""The word of a value (None: the name is that of its container), and the value."""


@dataclass(eq=False, slots=True)
class _Object:
    """An object of a class that is neither a tensor nor plain data."""

    name: str
    class_name: str
    owner: _Object | None
    """The object that it is inside of."""
    holds_bytes: bool
    holds_tensors: bool = False


class _Frame(NamedTuple):
    """A container or object that is being walked over."""

    children: Iterator[_Child]
    name: str
    label: str
    owner: _Object | None
    """The innermost object that it is inside of."""
    container: int
    """id of the container."""


class Walk:
    """Yield the tensors of a value, and collect the objects that hold none."""

    def __init__(
        self, budget: Budget, find: Callable[[str, Any], StoredTensor | Inside | None]
    ) -> None:
        self._budget, self._find = budget, find
        self._objects: dict[int, _Object] = {}
        """Objects that were visited, by id."""
        self._noted: list[_Object] = []
        self._open: set[int] = set()
        """ids of the containers that are being walked over, so that cycles end."""

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Classes and names of the objects whose data is in no tensor."""
        skipped = (item for item in self._noted if item.holds_bytes or not item.holds_tensors)
        return [(item.class_name, item.name) for item in skipped]

    def tensors(self, value: Any) -> Iterator[StoredTensor]:
        """Yield the tensors in nested values in order; a tensor can occur several times."""
        start = _Frame(iter([(None, value)]), "", "", None, 0)
        frames = [start]
        while frames:
            frame = frames[-1]
            for word, child in frame.children:
                if _is_leaf(child):
                    continue
                name = frame.name
                if word is not None:
                    name = f"{name}.{word}" if name else word
                    self._budget.charge(_NAME + sys.getsizeof(name))
                found = self._find(name or "tensor", child)
                if isinstance(found, StoredTensor):
                    _mark(frame.owner)
                    labels = (label for label in (found.label, frame.label) if label)
                    yield found._replace(label="; ".join(labels))
                inner = self._enter(frame, name, child, found)
                if inner is not None:
                    frames.append(inner)
                    break
            else:
                self._open.discard(frame.container)
                frames.pop()

    def _enter(
        self, frame: _Frame, name: str, value: Any, found: StoredTensor | Inside | None
    ) -> _Frame | None:
        """Return the frame of a value; None if there is nothing new in it."""
        if id(value) in self._open or isinstance(value, Storage):
            return None
        self._budget.charge(_SLOT * _count(value))
        owner, label = frame.owner, frame.label
        if isinstance(found, Inside):
            children, label = iter(found.children), "; ".join(filter(None, (found.label, label)))
        elif isinstance(found, StoredTensor):
            attributes = value.args[3] if value.function in HAVE_ATTRIBUTES else value.state
            if _is_leaf(attributes):
                return None
            children = _states(attributes)
        else:
            if isinstance(value, RecordedCall) and value.function not in _PLAIN:
                known = self._objects.get(id(value))
                if known is not None:
                    if known.holds_tensors:
                        _mark(owner)
                    return None
                self._budget.charge(_NAME)
                owner = self._note_object(name, value, owner)
            children = _children(value)
        if len(self._open) > _MAX_DEPTH or len(name) > _MAX_NAME_LENGTH:
            raise PickleError("lists in lists without end")
        self._open.add(id(value))
        return _Frame(children, name, label, owner, id(value))

    def _note_object(self, name: str, call: RecordedCall, owner: _Object | None) -> _Object:
        """Note an object that is visited for the first time."""
        holds_bytes = any(_has_bytes(value) for value in (call.args, call.state))
        is_small = not holds_bytes and call.state is None and all(map(_is_leaf, call.args))
        is_small = is_small and not call.entries and not call.members
        new = self._objects[id(call)] = _Object(name, call.function, owner, holds_bytes)
        if holds_bytes or (owner is None and not is_small):
            self._noted.append(new)
        return new


def _mark(item: _Object | None) -> None:
    """Note that an object holds a tensor, and those that it is inside of."""
    while item is not None and not item.holds_tensors:
        item.holds_tensors = True
        item = item.owner


def _is_leaf(value: Any) -> bool:
    """Return whether no tensor can be in a value."""
    if isinstance(value, (RecordedCall, Storage)):
        return False
    return not (value and type(value) in (dict, list, tuple))


def _count(value: Any) -> int:
    """Return how many values a container has, or how many a call was given."""
    if not isinstance(value, RecordedCall):
        return len(value)
    given = (*value.args[:4], value.args, value.state)
    return sum(len(item) for item in given if type(item) in (dict, list, tuple))


def _children(value: Any) -> Iterator[_Child]:
    if type(value) is dict:
        yield from _items(value, frozenset())
    elif isinstance(value, RecordedCall):
        yield from _parts(value)
    else:
        yield from ((str(i), item) for i, item in enumerate(value))


def _parts(call: RecordedCall) -> Iterator[_Child]:
    """Yield what a call was given."""
    args = call.args
    if call.function in _MAPPINGS and args and _are_pairs(args[0]):  # as Python 2 pickles them
        yield from ((_word(key, i), item) for i, (key, item) in enumerate(args[0]))
        args = args[1:]
    nested = [i for i, arg in enumerate(args) if not _is_leaf(arg)]
    for i in nested:
        is_state = len(args) == 1 or (len(nested) == 1 and type(args[i]) is dict)
        yield from _states(args[i]) if is_state else [(str(i), args[i])]
    yield from _states(call.state)
    yield None, call.entries
    yield None, call.members


def _states(state: Any) -> Iterator[_Child]:
    """Yield the attributes of an object: a dict, or a pair of dicts if its class has slots."""
    is_pair = type(state) is tuple and len(state) == 2
    dicts = state if is_pair and all(x is None or type(x) is dict for x in state) else (state,)
    for attributes in dicts:
        if type(attributes) is dict:
            yield from _items(attributes, _MODULE_DICTS)
        else:
            yield None, attributes


def _items(items: dict[Any, Any], dropped: frozenset[str]) -> Iterator[_Child]:
    """Yield the items of a dict, and those of its keys that may hold tensors."""
    for i, (key, value) in enumerate(items.items()):
        if isinstance(key, str) and key in dropped:
            yield None, value
            continue
        is_leaf = _is_leaf(value)
        has_key = isinstance(key, (Key, RecordedCall))
        word = "" if is_leaf and not has_key else _word(key, i)
        if has_key:
            yield f"{word}.key", key.value if isinstance(key, Key) else key
        if not is_leaf:
            yield word, value


def _are_pairs(value: Any) -> bool:
    return type(value) is list and all(
        type(item) in (tuple, list) and len(item) == 2 for item in value
    )


def _has_bytes(value: Any) -> bool:
    """Return whether a value, or one of those directly in it, is many bytes."""
    values = value.values() if type(value) is dict else value
    for item in values if type(value) in (dict, tuple, list) else (value,):
        is_bytes = isinstance(item, (bytes, bytearray, FileBytes))
        if isinstance(item, RecordedCall) and item.function == "_codecs.encode" and item.args:
            is_bytes, item = isinstance(item.args[0], (str, FileBytes)), item.args[0]
        elif isinstance(item, FileBytes):
            is_bytes = not item.is_text
        if is_bytes and (isinstance(item, FileBytes) or len(item) > _SMALL_BYTES):
            return True
    return False


def _word(key: Any, position: int) -> str:
    """Return the word in a tensor's name for a key of a dict or a list, or for its position."""
    value = key.value if isinstance(key, Key) else key
    if isinstance(value, Global):
        return value.name
    if isinstance(value, str):
        return value
    items = value if type(value) is tuple else (value,)
    is_short = len(items) <= MAX_DIMENSIONS and all(_is_word(item) for item in items)
    return str(value if is_short else position)


def _is_word(value: Any) -> bool:
    """Return whether the repr of a value needs little memory and time."""
    if isinstance(value, int):
        return abs(value) < MAX_SIZE
    if isinstance(value, (str, bytes)):
        return len(value) <= _MAX_WORD_LENGTH
    return value is None or isinstance(value, float)
