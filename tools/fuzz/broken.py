"""Cases that crash, hang and are wrong; tests/test_fuzz.py checks that the campaign notices."""

import os
import time


def run(seed: int) -> int:
    if seed == 3:
        os.abort()
    if seed == 5:
        time.sleep(600)
    assert seed != 8
    return 1
