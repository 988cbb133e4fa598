"""Reads a pickle as plain data: nothing that it names is imported, and nothing is called.

A pickle is a program for a stack machine, which may name any function and have it called. This
machine has no such instruction: a name that is not on the caller's list is refused, and what is on
it makes a `Made`, which only records what would have been called with what. (`pickle.Unpickler`
with a `find_class` of one's own would still call things and set attributes on them.)
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from typing import IO, Any


class PickleError(Exception):
    """What is wrong with a pickle, in words that follow "got"."""


class Global:
    """A function or class that a pickle names, and no more than its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What a pickle would have made by calling `kind`."""

    __slots__ = ("args", "items", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None
        self.items: Any = None


_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
"""Made as plain dicts."""

_MOST_INSTRUCTIONS = 10_000_000
_MOST_CONTAINERS = 2_000_000
_LONGEST_NAME = 1000
_LONGEST = 64 << 20
"""Of these no checkpoint comes near, and the time and memory that a pickle can take are bounded."""

_FLAT = (str, bytes, int, float, bool, type(None), Global, Made)
"""What a key may be, or a tuple of: the hash of tuples in tuples may never end."""

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
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
    """The value of the pickle that `file` is at; names ("module.name") must be `allowed`.

    `persistent` makes something of a persistent id, which is how torch refers to storages. Raises
    PickleError, whatever is wrong.
    """
    machine = _Machine(allowed, persistent)
    limited: Any = _Limited(file)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(limited)):
            if opcode.name == "STOP":
                break
            if count > _MOST_INSTRUCTIONS:
                raise PickleError(f"a pickle of more than {_MOST_INSTRUCTIONS:,} instructions")
            machine.step(opcode.name, argument)
        return machine.pop()
    except PickleError:
        raise
    except Exception as error:  # a broken pickle fails in as many ways as there are instructions
        raise PickleError(f"a broken pickle ({type(error).__name__}: {error})") from None


class _Limited:
    """A file that gives no more at a time than a checkpoint's pickle has in one value."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if size > _LONGEST:
            raise PickleError(f"a pickle with a value of {size:,} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST)


class _Machine:
    def __init__(self, allowed: Collection[str], persistent: Callable[[Any], Any] | None) -> None:
        self._allowed = allowed
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._containers = 0

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
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
        elif name in _EMPTY:
            self._count_container()
            push(_EMPTY[name]())
        elif name == "MARK":
            push(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._count_container()
            push(tuple(reversed([self.pop() for _ in range(int(name[-1]))])))
        elif name not in ("PROTO", "FRAME"):
            self._compound(name, argument)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PickleError("a broken pickle (a mark where a value should be)")
        return value

    def _to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _compound(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name in ("SETITEM", "SETITEMS"):
            pairs = self._to_mark() if name == "SETITEMS" else [*reversed([self.pop(), self.pop()])]
            self._items(dict).update(zip(_keys(pairs[::2]), pairs[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            values = self._to_mark() if name == "APPENDS" else [self.pop()]
            self._items(list).extend(values)
        elif name == "ADDITEMS":
            values = self._to_mark()
            self._items(set).update(_keys(values))
        elif name in ("TUPLE", "LIST"):
            self._count_container()
            push((tuple if name == "TUPLE" else list)(self._to_mark()))
        elif name == "FROZENSET":
            self._count_container()
            push(frozenset(_keys(self._to_mark())))
        elif name == "DICT":
            self._count_container()
            pairs = self._to_mark()
            push(dict(zip(_keys(pairs[::2]), pairs[1::2], strict=True)))
        elif name == "GLOBAL":
            push(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            push(self._global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, made = self.pop(), self.pop()
            self._count_container()
            push(_make(made, args))
        elif name == "BUILD":
            state = self.pop()
            if isinstance(self._stack[-1], Made):
                self._stack[-1].state = state
            elif not isinstance(self._stack[-1], dict):  # the attributes of an OrderedDict: no loss
                raise PickleError("a broken pickle (a state for what has none)")
        elif name == "BINPERSID" and self._persistent is not None:
            push(self._persistent(self.pop()))
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        else:
            raise PickleError(f"a pickle with the instruction {name}, which no checkpoint needs")

    def _count_container(self) -> None:
        self._containers += 1
        if self._containers > _MOST_CONTAINERS:
            raise PickleError(f"a pickle of more than {_MOST_CONTAINERS:,} containers")

    def _items(self, kind: type) -> Any:
        """What items are put in: the container on the stack, or what a `Made` has gathered."""
        target = self._stack[-1]
        if isinstance(target, Made):
            if target.items is None:
                target.items = kind()
            target = target.items
        if type(target) is not kind:
            raise PickleError(f"a broken pickle (items for a {type(target).__name__})")
        return target

    def _global(self, module: Any, attribute: Any) -> Global:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise PickleError("a broken pickle (a name that is no text)")
        name = f"{module}.{attribute}"[:_LONGEST_NAME]
        if name not in self._allowed:
            raise PickleError(
                f"a pickle that refers to {name!r}, neither a tensor nor plain data (nothing was "
                "executed)"
            )
        return Global(name)


def _make(made: Any, args: Any) -> Any:
    if not isinstance(made, Global) or not isinstance(args, tuple):
        raise PickleError("a broken pickle (a call of what is no function)")
    if made.name in _MAPPINGS:
        pairs = args[0] if args else {}
        if isinstance(pairs, list) and all(isinstance(p, (tuple, list)) for p in pairs):
            return dict(zip(_keys([k for k, _ in pairs]), [v for _, v in pairs], strict=True))
        return dict(pairs) if isinstance(pairs, dict) else {}
    if made.name == "torch.Size":
        return tuple(*args)
    return Made(made.name, args)


def _keys(values: list[Any]) -> list[Any]:
    for value in values:
        inner = value if type(value) is tuple else (value,)
        if not all(isinstance(one, _FLAT) for one in inner):
            raise PickleError("a pickle with a key that is neither text nor a number")
    return values
