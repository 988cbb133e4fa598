"""Compute the checksum CRC-32 of bytes, as zip archives have it."""

from __future__ import annotations

from zlib import crc32

__all__ = ["crc32"]
