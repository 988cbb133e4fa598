"""Check the CRC-32 of the records of archives while their bytes are read for something else."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import IO, NamedTuple

from paramstats._core.backend import active
from paramstats.checkpoints._stored_tensors import Checksum, StoredTensor

_CHUNK = 1 << 20


class _Progress(NamedTuple):
    end: int
    """Where the next byte is, of which the checksum is not known yet."""
    crc: int


class Checksums:
    """The records of archives, of which bytes are read in pieces.

    A record is checked if its bytes are read from the first to the last. Pieces may overlap.
    Records with bytes that no tensor needs are not checked.
    """

    def __init__(self, checksums: Iterable[Checksum]) -> None:
        self._records: dict[str, list[Checksum]] = {}
        for record in sorted(checksums):
            self._records.setdefault(record.path, []).append(record)
        self._progress: dict[tuple[str, int], _Progress] = {}
        self._damaged: list[Checksum] = []

    def update(self, path: str, begin: int, data: memoryview) -> None:
        """Note bytes that were read: those of a file from `begin` on."""
        records = self._records.get(path, ())
        end = begin + len(data)
        first = max(bisect.bisect_right(records, begin, key=lambda record: record.begin) - 1, 0)
        for i in range(first, len(records)):
            record = records[i]
            if record.begin >= end:
                break
            key = path, record.begin
            progress = self._progress.get(key) or _Progress(record.begin, 0)
            last = min(end, record.begin + record.nbytes)
            if begin <= progress.end < last:
                crc = active().crc32(data[progress.end - begin : last - begin], progress.crc)
                self._progress[key] = _Progress(last, crc)
                if last == record.begin + record.nbytes and crc != record.crc:
                    self._damaged.append(record)

    def damage(self, tensors: Iterable[StoredTensor]) -> dict[int, str]:
        """Return the reason why tensors cannot be trusted, by their position."""
        ranges: dict[str, list[Checksum]] = {}
        for record in sorted(self._damaged):
            ranges.setdefault(record.path, []).append(record)
        reasons: dict[int, str] = {}
        for i, tensor in enumerate(tensors if ranges else ()):
            for part in tensor.parts:
                damaged = ranges.get(part.path, ())
                at = bisect.bisect_right(damaged, part.offset, key=lambda record: record.begin) - 1
                if at >= 0 and part.offset < damaged[at].begin + damaged[at].nbytes:
                    reasons[i] = f"damaged: the CRC-32 of record {damaged[at].name!r} differs"
        return reasons


def crc_of_file(file: IO[bytes], begin: int, nbytes: int) -> int:
    """Return the CRC-32 of a range of a file."""
    crc = 0
    file.seek(begin)
    while nbytes > 0 and (data := file.read(min(nbytes, _CHUNK))):
        crc = active().crc32(data, crc)
        nbytes -= len(data)
    return crc
