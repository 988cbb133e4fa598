"""Test the CRC-32 of both backends: it must be that of zlib."""

from __future__ import annotations

import random
import zlib

import pytest

from paramstats._core.backend import Implementation


@pytest.mark.parametrize("size", [0, 1, 7, 255, 256, 257, 4096, 100_001])
def test_crc32_is_that_of_zlib(backend: Implementation, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert backend.crc32(data) == zlib.crc32(data)
    first = size // 3
    parts = backend.crc32(memoryview(data)[:first]), memoryview(bytearray(data))[first:]
    assert backend.crc32(parts[1], parts[0]) == zlib.crc32(data)


def test_crc32_refuses_bytes_with_gaps(backend: Implementation) -> None:
    with pytest.raises((BufferError, ValueError)):
        backend.crc32(memoryview(b"abcdef")[::2])
