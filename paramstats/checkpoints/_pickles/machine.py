"""Read a pickle as plain data: import nothing that it names, and call nothing.

A pickle is a program for a stack machine, and may name any function and have it called. The machine
in this file has no such instruction. A name only becomes a `Global`, and a call a `RecordedCall`.
(`pickle.Unpickler` with its own `find_class` would not be enough: it still calls what `find_class`
returns.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles.instructions import read_instructions


@dataclass(eq=False, repr=False, slots=True)
class Global:
    """A function or class in a pickle: only its name, as "module.name"."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False, repr=False, slots=True)
class RecordedCall:
    """A call in a pickle, recorded instead of executed."""

    function: str
    args: tuple[Any, ...]
    state: Any = None
    """What the pickle sets as attributes of the result."""
    entries: dict[Any, Any] | None = None
    """What the pickle adds to the result under keys."""
    members: list[Any] | None = None
    """What the pickle appends to the result."""

    def __repr__(self) -> str:
        return f"{self.function}(...)"


@dataclass(eq=False, repr=False, slots=True)
class Key:
    """A key of a dict that is neither text nor a small integer.

    It is neither hashed nor compared: a pickle can hold many values with one hash, and tuples that
    take forever to hash.
    """

    value: Any


UNNAMED = "an unnamed function"
"""The function of a call of an object. The object is the first argument."""

_CONSTRUCTORS = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
)
"""Functions that make an object of the class in their first argument."""

_MAX_NAME_LENGTH = 1000

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


def load(file: IO[bytes], budget: Budget, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Return the value of the pickle at the current position of a file.

    `persistent` converts persistent ids, with which torch refers to storages. Raises PickleError if
    the pickle is damaged.
    """
    machine = _Machine(budget, persistent)
    try:
        for name, argument in read_instructions(file, budget):
            machine.step(name, argument)
        return machine.pop()
    except (PickleError, OSError):
        raise
    except Exception as error:  # every instruction can fail in its own way
        raise PickleError(f"a damaged pickle ({type(error).__name__}: {error})") from None


class _Machine:
    """The stack machine that executes the instructions of a pickle."""

    def __init__(self, budget: Budget, persistent: Callable[[Any], Any] | None) -> None:
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
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._pop_values(None)
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._push_new(self._opaque_value(name, argument))

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

    def _opaque_value(self, name: str, argument: Any) -> Any:
        """Execute an instruction about a name, a call or a persistent id; return what to push."""
        if name == "GLOBAL":
            return self._global(*argument.split(" ", 1))
        if name == "STACK_GLOBAL":
            module, attribute = self._pop_values(2)
            return self._global(module, attribute)
        if name in ("REDUCE", "NEWOBJ"):
            return self._call(*self._pop_values(2))
        if name == "NEWOBJ_EX":
            return self._call(*self._pop_values(3))
        if name == "INST":
            return self._call(self._global(*argument.split(" ", 1)), tuple(self._pop_values(None)))
        if name == "OBJ":
            function, *args = self._pop_values(None)
            return self._call(function, tuple(args))
        if name == "BUILD":
            return self._with_state(*self._pop_values(2))
        if name in ("PERSID", "BINPERSID"):
            reference = argument if name == "PERSID" else self.pop()
            known = self._persistent and self._persistent(reference)
            return known or RecordedCall("a persistent id", (reference,))
        if name in ("EXT1", "EXT2", "EXT4"):
            return RecordedCall("a registered extension", (argument,))
        raise PickleError(f"a pickle whose data is in another file (instruction {name})")

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
        """Return the container on top of the stack, or what is added to a RecordedCall there."""
        target = self._stack[-1]
        if isinstance(target, RecordedCall):
            field = "members" if kind is list else "entries"
            if getattr(target, field) is None:
                setattr(target, field, kind())
                self._charge(sys.getsizeof(getattr(target, field)))
            target = getattr(target, field)
        if type(target) is not kind:
            raise PickleError(f"a damaged pickle (items for {type(target).__name__})")
        return target

    def _global(self, module: Any, attribute: Any) -> Global:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise PickleError("a damaged pickle (a name that is not a string)")
        name = f"{module}.{attribute}"[:_MAX_NAME_LENGTH]
        self._charge(sys.getsizeof(name))
        return Global(name)

    def _call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        """Return what stands for a call."""
        if type(args) is not tuple or kwargs or not isinstance(function, Global):
            args = args if type(args) is tuple else (args,)
            args = (*args, kwargs) if kwargs else args
            args = args if isinstance(function, Global) else (function, *args)
            self._charge(sys.getsizeof(args))
        name = function.name if isinstance(function, Global) else UNNAMED
        if name in _CONSTRUCTORS and args and isinstance(args[0], Global):
            begin = 2 if name.endswith("_reconstructor") else 1  # after the class and its base
            name, args = args[0].name, args[begin:]
            self._charge(sys.getsizeof(args))
        if name == "torch.Size":
            return tuple(args[0]) if args and type(args[0]) in (tuple, list) else ()
        return RecordedCall(name, args)

    def _with_state(self, target: Any, state: Any) -> Any:
        """Return an object after the pickle set its attributes."""
        if not isinstance(target, RecordedCall):
            return RecordedCall(UNNAMED, (target,), state)
        target.state = state if target.state is None else (target.state, state)
        return target


def _index(number: int) -> int:
    if number < 0:
        raise PickleError("a damaged pickle (a negative number of an object)")
    return number


def _checked(value: Any) -> Any:
    if value is _MARK:
        raise PickleError("a damaged pickle (a mark in place of a value)")
    return value
