"""Read a pickle as plain data: import nothing that it names, and call nothing.

A pickle is a program for a stack machine, and may name any function and have it called. The machine
in this file has no such instruction. It refuses every name that is not on the caller's list, and a
call of a name on the list only becomes a `RecordedCall`. (`pickle.Unpickler` with its own
`find_class` would not be enough: it still calls what `find_class` returns.)
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any


class PickleError(Exception):
    """A pickle is damaged or refused; the message continues "expected ..., got "."""


@dataclass(eq=False, slots=True)
class Global:
    """A function or class in a pickle: only its name, as "module.name"."""

    name: str


@dataclass(eq=False, slots=True)
class RecordedCall:
    """A call in a pickle, recorded instead of executed."""

    function: str
    args: tuple[Any, ...]
    state: Any = None
    """What the pickle sets as attributes of the result."""
    items: Any = None
    """What the pickle adds to the result."""


_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
"""Classes that are read as plain dicts."""

# These limits bound the time and memory that a pickle can take. No checkpoint comes near them.
_MAX_INSTRUCTIONS = 10_000_000
_MAX_CONTAINERS = 2_000_000
_MAX_NAME_LENGTH = 1000
_MAX_VALUE_BYTES = 64 << 20

_KEY_TYPES = (str, bytes, int, float, bool, type(None), Global, RecordedCall)
"""Allowed types of a key, or of the items of a tuple that is a key. Tuples in tuples are refused:
hashing them can take forever."""

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS: dict[str, tuple[type, int | None]] = {
    **{"EMPTY_DICT": (dict, 0), "EMPTY_LIST": (list, 0), "EMPTY_SET": (set, 0)},
    **{"EMPTY_TUPLE": (tuple, 0), "TUPLE1": (tuple, 1), "TUPLE2": (tuple, 2), "TUPLE3": (tuple, 3)},
    **{"TUPLE": (tuple, None), "LIST": (list, None), "DICT": (dict, None)},
    "FROZENSET": (frozenset, None),
}
"""Instructions that push a container: its type, and how many values they pop for it (None: all down
to the mark)."""

_ADDITIONS: dict[str, tuple[type, int | None]] = {
    **{"SETITEM": (dict, 2), "SETITEMS": (dict, None), "ADDITEMS": (set, None)},
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
    file: IO[bytes], allowed: Collection[str], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Return the value of the pickle at the current position of a file.

    Names ("module.name") must be `allowed`. `persistent` converts persistent ids, with which torch
    refers to storages. Raises PickleError if the pickle is damaged or refused.
    """
    machine = _Machine(allowed, persistent)
    limited: Any = _LimitedFile(file)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(limited)):
            if opcode.name == "STOP":
                break
            if count > _MAX_INSTRUCTIONS:
                raise PickleError(f"a pickle of more than {_MAX_INSTRUCTIONS:,} instructions")
            machine.step(opcode.name, argument)
        return machine.pop()
    except PickleError:
        raise
    except Exception as error:  # every instruction can fail in its own way
        raise PickleError(f"a damaged pickle ({type(error).__name__}: {error})") from None


class _LimitedFile:
    """A file that refuses to read more bytes at once than a value of a pickle may have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if size > _MAX_VALUE_BYTES:
            raise PickleError(f"a pickle with a value of {size:,} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_VALUE_BYTES)


class _Machine:
    """The stack machine that executes the instructions of a pickle."""

    def __init__(self, allowed: Collection[str], persistent: Callable[[Any], Any] | None) -> None:
        self._allowed = allowed
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._containers = 0

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        push = self._stack.append
        if name in _VALUES:
            push(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self._memo[argument])
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name == "MARK":
            push(_MARK)
        elif name in _CONTAINERS:
            kind, count = _CONTAINERS[name]
            self._push_container(_container(kind, self._pop_values(count)))
        elif name in _ADDITIONS:
            kind, count = _ADDITIONS[name]
            values = _container(kind, self._pop_values(count))
            target = self._container_on_top(kind)
            (target.extend if kind is list else target.update)(values)
        elif name not in ("PROTO", "FRAME"):
            self._step_with_names(name, argument)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PickleError("a damaged pickle (a mark in place of a value)")
        return value

    def _pop_values(self, count: int | None) -> list[Any]:
        """Pop `count` values, or all down to the mark."""
        if count is not None:
            return [self.pop() for _ in range(count)][::-1]
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _step_with_names(self, name: str, argument: Any) -> None:
        """Execute an instruction that concerns names, calls, storages, or the stack alone."""
        push = self._stack.append
        if name == "GLOBAL":
            push(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            push(self._global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = self.pop(), self.pop()
            self._push_container(_record_call(function, args))
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

    def _push_container(self, container: Any) -> None:
        self._containers += 1
        if self._containers > _MAX_CONTAINERS:
            raise PickleError(f"a pickle of more than {_MAX_CONTAINERS:,} containers")
        self._stack.append(container)

    def _container_on_top(self, kind: type) -> Any:
        """Return the container on top of the stack, or the items of a RecordedCall there."""
        target = self._stack[-1]
        if isinstance(target, RecordedCall):
            if target.items is None:
                target.items = kind()
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
        return Global(name)


def _record_call(function: Any, args: Any) -> Any:
    """Return what stands for a call: plain data for containers, a RecordedCall otherwise."""
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise PickleError("a damaged pickle (a call of an object that is not a function)")
    if function.name in _MAPPINGS:
        pairs = args[0] if args else {}
        if isinstance(pairs, list) and all(isinstance(p, (tuple, list)) for p in pairs):
            return _container(dict, [item for key, value in pairs for item in (key, value)])
        return dict(pairs) if isinstance(pairs, dict) else {}
    if function.name == "torch.Size":
        return tuple(*args)
    return RecordedCall(function.name, args)


def _container(kind: type, values: list[Any]) -> Any:
    if kind is dict:
        return dict(zip(_checked_keys(values[::2]), values[1::2], strict=True))
    return kind(_checked_keys(values) if kind in (set, frozenset) else values)


def _checked_keys(keys: list[Any]) -> list[Any]:
    for key in keys:
        items = key if type(key) is tuple else (key,)
        if not all(isinstance(item, _KEY_TYPES) for item in items):
            raise PickleError("a pickle with a key that is neither text nor a number")
    return keys
