"""What the campaign must tell: a case that crashes, one that hangs, one that is wrong; leaks."""

from __future__ import annotations

import os
import time


def run(seed: int) -> int:
    if seed == 3:
        os.abort()
    if seed == 5:
        time.sleep(600)
    if seed == 8:
        raise AssertionError(f"wrong at {seed}")
    return 1


def leaks() -> None:
    from tools.fuzz import memory

    kept: list[object] = []
    model = memory.Model()
    memory.gc.collect = lambda: 0  # type: ignore[assignment]  # slow; nothing here is a cycle
    assert memory.measured("", lambda: kept.append(model), 100, model).references == 100
    assert memory.measured("", lambda: kept.append(object()), 1000, model).blocks >= 1000
    assert memory.measured("", lambda: kept.append(b"x" * 65536), 300, model).mebibytes > 5
    assert memory.measured("", lambda: None, 1000, model).grew is False


if __name__ == "__main__":
    leaks()
