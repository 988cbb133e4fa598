"""Bound the memory and time that the data structures of files can take."""

from __future__ import annotations

from paramstats.checkpoints._errors import PickleError


class Budget:
    """The bytes of memory that files may still ask for.

    A small file can describe large objects: it names an object once and refers to it often. So
    every object and every visit of one is charged, and every byte that is read adds to the budget.
    What torch writes uses less than it adds.
    """

    BASE = 16 << 20
    PER_BYTE = 48

    def __init__(self) -> None:
        self._left = self.BASE

    def add(self, bytes_read: int) -> None:
        """Allow more, because so many bytes were read."""
        self._left += self.PER_BYTE * bytes_read

    def charge(self, nbytes: int) -> None:
        """Take from the budget; raise PickleError if it is spent."""
        self._left -= nbytes
        if self._left < 0:
            raise PickleError("a small pickle that describes very large objects")
