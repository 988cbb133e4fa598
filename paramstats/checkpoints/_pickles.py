"""Read a pickle as plain data: import nothing that it names, and call nothing.

A pickle is a program for a stack machine, and may name any function and have it called. The machine
in this file has no such instruction. It refuses every name that is not on the caller's list, and a
call of a name on the list only becomes a `RecordedCall`. (`pickle.Unpickler` with its own
`find_class` would not be enough: it still calls what `find_class` returns.)
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any

from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError


@dataclass(eq=False, repr=False, slots=True)
class Global:
    """A function or class in a pickle: only its name, as "module.name"."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class RecordedCall:
    """A call in a pickle, recorded instead of executed."""

    function: str
    args: tuple[Any, ...]
    state: Any = None
    """What the pickle sets as attributes of the result."""
    items: Any = None
    """What the pickle adds to the result."""


@dataclass(eq=False, repr=False, slots=True)
class Key:
    """A key of a dict that is neither text nor a small integer.

    It is neither hashed nor compared: a pickle can hold many values with one hash, and tuples that
    take forever to hash.
    """

    value: Any


_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
"""Classes that are read as plain dicts."""

_MAX_NAME_LENGTH = 1000
_MAX_VALUE_BYTES = 64 << 20
_MAX_LINE_BYTES = 1 << 16
"""Converting a longer line of digits to a number would take long."""

_MAX_KEY = 1 << 60
"""Smaller integers all have different hashes."""

_SLOT = 16
"""Bytes of memory of an item of a list. The stack and the memo are not charged: an instruction adds
one item to them, and is at least one byte of the file."""

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS: dict[str, tuple[type, int | None]] = {
    **{"EMPTY_DICT": (dict, 0), "EMPTY_LIST": (list, 0), "EMPTY_SET": (list, 0)},
    **{"EMPTY_TUPLE": (tuple, 0), "TUPLE1": (tuple, 1), "TUPLE2": (tuple, 2), "TUPLE3": (tuple, 3)},
    **{"TUPLE": (tuple, None), "LIST": (list, None), "DICT": (dict, None)},
    "FROZENSET": (tuple, None),
}
"""Instructions that push a container: its type, and how many values they pop for it (None: all down
to the mark). Sets are read as lists and tuples, so that their members are not hashed."""

_ADDITIONS: dict[str, tuple[type, int | None]] = {
    **{"SETITEM": (dict, 2), "SETITEMS": (dict, None), "ADDITEMS": (list, None)},
    **{"APPEND": (list, 1), "APPENDS": (list, None)},
}
"""Instructions that add values to a container, in the same form."""

_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    }
)
"""Instructions that push their argument."""


def load(
    file: IO[bytes],
    allowed: Collection[str],
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the value of the pickle at the current position of a file.

    Names ("module.name") must be `allowed`. `persistent` converts persistent ids, with which torch
    refers to storages. Raises PickleError if the pickle is damaged or refused.
    """
    machine = _Machine(allowed, budget, persistent)
    limited: Any = _LimitedFile(file, budget)
    try:
        for opcode, argument, _ in pickletools.genops(limited):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        return machine.pop()
    except (PickleError, OSError):
        raise
    except Exception as error:  # every instruction can fail in its own way
        raise PickleError(f"a damaged pickle ({type(error).__name__}: {error})") from None


class _LimitedFile:
    """A file that refuses to read more bytes at once than a value of a pickle may have."""

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        self._file, self._budget = file, budget

    def read(self, size: int) -> bytes:
        if size > _MAX_VALUE_BYTES:
            raise PickleError(f"a pickle with a value of {size:,} bytes")
        data = self._file.read(size)
        self._budget.add(len(data))
        return data

    def readline(self) -> bytes:
        data = self._file.readline(_MAX_LINE_BYTES)
        self._budget.add(len(data))
        return data


class _Machine:
    """The stack machine that executes the instructions of a pickle."""

    def __init__(
        self,
        allowed: Collection[str],
        budget: Budget,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self._allowed = allowed
        self._charge = budget.charge
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        if name in _VALUES:
            if type(argument) is not int or not -5 <= argument <= 256:  # Python shares these
                self._charge(sys.getsizeof(argument))
            self._stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._remember(argument)
        elif name == "MEMOIZE":
            self._remember(len(self._memo))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(_checked(self._memo[_index(argument)]))
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name == "MARK":
            self._stack.append(_MARK)
        elif name in _CONTAINERS:
            kind, count = _CONTAINERS[name]
            self._push_new(self._container(kind, self._pop_values(count)))
        elif name in _ADDITIONS:
            kind, count = _ADDITIONS[name]
            values = self._container(kind, self._pop_values(count))
            target = self._container_on_top(kind)
            before = sys.getsizeof(target)
            (target.extend if kind is list else target.update)(values)
            self._charge(sys.getsizeof(target) - before)
        elif name not in ("PROTO", "FRAME"):
            self._step_with_names(name, argument)

    def pop(self) -> Any:
        return _checked(self._stack.pop())

    def _pop_values(self, count: int | None) -> list[Any]:
        """Pop `count` values, or all down to the mark."""
        if count is not None:
            return [self.pop() for _ in range(count)][::-1]
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _push_new(self, value: Any) -> None:
        """Push an object that this instruction made."""
        self._charge(sys.getsizeof(value))
        self._stack.append(value)

    def _remember(self, index: int) -> None:
        """Put the value on top of the stack into the memo. Picklers count the index up."""
        value, gap = self._stack[-1], _index(index) + 1 - len(self._memo)
        if gap > 0:
            self._charge(_SLOT * (gap - 1))
            self._memo += [_MARK] * gap
        self._memo[index] = value

    def _step_with_names(self, name: str, argument: Any) -> None:
        """Execute an instruction that concerns names, calls, storages, or the stack alone."""
        push = self._push_new
        if name == "GLOBAL":
            push(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            push(self._global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = self.pop(), self.pop()
            push(self._record_call(function, args))
        elif name == "BUILD":
            state, target = self.pop(), self._stack[-1]
            if isinstance(target, RecordedCall):
                target.state = state
            elif not isinstance(target, dict):  # attributes of an OrderedDict are ignored
                raise PickleError("a damaged pickle (a state for an object without one)")
        elif name == "BINPERSID" and self._persistent is not None:
            push(self._persistent(self.pop()))
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._pop_values(None)
        else:
            raise PickleError(f"a pickle with the instruction {name}, which no checkpoint needs")

    def _container(self, kind: type, values: list[Any]) -> Any:
        if kind is not dict:
            return kind(values)
        keys = [self._key(key) for key in values[::2]]
        return dict(zip(keys, values[1::2], strict=True))

    def _key(self, key: Any) -> Any:
        if type(key) is int and -_MAX_KEY < key < _MAX_KEY:
            return key
        if isinstance(key, (str, Global, RecordedCall)):
            return key
        self._charge(sys.getsizeof(new := Key(key)))
        return new

    def _container_on_top(self, kind: type) -> Any:
        """Return the container on top of the stack, or the items of a RecordedCall there."""
        target = self._stack[-1]
        if isinstance(target, RecordedCall):
            if target.items is None:
                target.items = kind()
                self._charge(sys.getsizeof(target.items))
            target = target.items
        if type(target) is not kind:
            raise PickleError(f"a damaged pickle (items for {type(target).__name__})")
        return target

    def _global(self, module: Any, attribute: Any) -> Global:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise PickleError("a damaged pickle (a name that is not a string)")
        name = f"{module}.{attribute}"[:_MAX_NAME_LENGTH]
        if name not in self._allowed:
            raise PickleError(
                f"a pickle that refers to {name!r}, which is neither a tensor nor plain data "
                "(nothing was executed)"
            )
        self._charge(sys.getsizeof(name))
        return Global(name)

    def _record_call(self, function: Any, args: Any) -> Any:
        """Return what stands for a call: plain data for containers, a RecordedCall otherwise."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise PickleError("a damaged pickle (a call of an object that is not a function)")
        first = args[0] if args else None
        if function.name in _MAPPINGS:
            if isinstance(first, list):
                self._charge(_SLOT * len(first))
                return self._container(dict, [x for key, value in first for x in (key, value)])
            return dict(first) if isinstance(first, dict) else {}
        if function.name == "torch.Size":
            return tuple(first) if isinstance(first, (tuple, list)) else ()
        return RecordedCall(function.name, args)


def _index(number: int) -> int:
    if number < 0:
        raise PickleError("a damaged pickle (a negative number of an object)")
    return number


def _checked(value: Any) -> Any:
    if value is _MARK:
        raise PickleError("a damaged pickle (a mark in place of a value)")
    return value
