"""What the campaign must tell: a case that crashes, one that hangs and one that is wrong."""

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
