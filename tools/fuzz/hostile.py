"""Strings, dictionaries and modules that lie, raise or change the model when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import paramstats

if TYPE_CHECKING:
    from tools.fuzz.damage import Case


class HostileError(Exception):
    """Raised by the classes of this module."""


class Text(str):
    """A string that may have attributes."""


class Rewriting(str):
    """A string that changes when a prefix is added."""

    def __radd__(self, other: str) -> str:
        return f"{other}rewritten"


class LyingDict(dict):
    def items(self) -> Any:
        return {"lie": nn.Parameter(torch.ones(2))}.items()

    def __iter__(self) -> Iterator[Any]:
        return iter(["lie"])


class RaisingDict(dict):
    def items(self) -> Any:
        raise HostileError

    def __len__(self) -> int:
        raise HostileError

    def values(self) -> Any:
        raise HostileError


class Meta(type):
    """A metaclass whose classes lie about inheritance and sometimes have no attributes."""

    accesses = 0

    def __getattribute__(cls, name: str) -> Any:
        Meta.accesses += 1
        if Meta.accesses % 7 == 0:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def __subclasscheck__(cls, other: type) -> bool:
        return True

    def __instancecheck__(cls, other: Any) -> bool:
        return False


class WithMeta(nn.Module, metaclass=Meta):
    pass


class PropertyParameters(nn.Module):
    """A module whose `_parameters` is a property of the class."""

    def __init__(self) -> None:
        self.__dict__["real"] = {}
        super().__init__()
        self.__dict__["_parameters"] = {"hidden": nn.Parameter(torch.zeros(1))}

    @property
    def _parameters(self) -> Any:
        return {"shown": self.__dict__["real"].setdefault("p", nn.Parameter(torch.ones(2)))}

    @_parameters.setter
    def _parameters(self, value: Any) -> None:
        pass


class Raising(nn.Module):
    @property
    def weight(self) -> Any:
        raise HostileError

    @property
    def _buffers(self) -> Any:
        raise HostileError

    @_buffers.setter
    def _buffers(self, value: Any) -> None:
        pass


class Lying(nn.Module):
    def __getattr__(self, name: str) -> Any:
        return {"_parameters": {}, "_modules": {}}.get(name, lambda *a, **k: iter(()))


class Intercepting(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        if name == "_parameters":
            return {}
        return super().__getattribute__(name)


class Unhashable(nn.Module):
    __hash__ = None  # type: ignore[assignment]


class RaisesHash(nn.Module):
    def __hash__(self) -> int:
        raise HostileError


class AllEqual(nn.Module):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Slotted(nn.Module):
    __slots__ = ("_extra", "weight")


class Pretender:
    """Claims to be a module."""

    def __init__(self) -> None:
        self._parameters = {"w": torch.ones(1)}
        self._buffers: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}

    @property
    def __class__(self) -> Any:
        return nn.Module


class Recursing(nn.Module):
    """Calls `summarize` with itself while its parameters are listed."""

    depth = 0

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        if Recursing.depth < 3:
            Recursing.depth += 1
            try:
                paramstats.summarize(self)
            finally:
                Recursing.depth -= 1
        return super().named_parameters(*args, **kwargs)


class Listing(nn.Module):
    """Lists the parameters that it was given."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.__dict__.get("listed", ()))


class Colliding:
    """An attribute name with the hash of `_modules`; a comparison changes the model."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __hash__(self) -> int:
        return hash("_modules")

    def __eq__(self, other: object) -> bool:
        self.case.strike()
        return False


class Finalized:
    """Changes the model when the garbage collector finds it."""

    def __init__(self, case: Case) -> None:
        self.cycle, self.case = self, case

    def __del__(self) -> None:
        self.case.strike()


CLASSES = (
    WithMeta,
    PropertyParameters,
    Raising,
    Lying,
    Intercepting,
    Unhashable,
    RaisesHash,
    AllEqual,
    Slotted,
)
