"""`Header`: what every rank sends before its rows, from which all ranks decide alike."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._sharded.merging import WORDS, hash_word

HAS_FAILED = -1
"""`Header.details` of a rank that could not read."""

_MAGIC = hash_word("paramstats")
"""Tells a header from the data of another collective call."""


class Header(NamedTuple):
    """The header of a rank; all words but `digest` are 64-bit integers."""

    digest: bytes
    """The digest of the rank's tensors."""
    agreement: int
    """What the ranks agreed on; 0 without agreement."""
    backend: int
    """A hash. Different SIMD instructions may round the last bit of a replica differently."""
    details: int
    """The size of the rank's details in bytes, or HAS_FAILED."""
    partial: int
    """A hash of its partial tensors' specs; 0 if there are none."""
    arguments: int
    """A hash of the arguments of `summarize` that must be equal on all ranks."""
    magic: int = _MAGIC

    def words(self) -> Tensor:
        """Return the header as a row of WORDS words."""
        words = [*struct.unpack("=4q", self.digest), *self[1:]]
        words += [0] * (WORDS - len(words))
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    @classmethod
    def of_words(cls, words: list[int]) -> Header:
        """Return the header that a rank has sent as words."""
        return cls(struct.pack("=4q", *words[:4]), *words[4:10])

    def is_valid(self) -> bool:
        """Return whether these words are a header."""
        return self.magic == _MAGIC
