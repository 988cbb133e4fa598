"""Measures the host time of a call on CUDA tensors until it first calls the driver, without a GPU.

    python -m benches.cuda_host

A library whose functions do nothing takes the place of CUDA's driver, and tensors of
tests/fake_cuda report a CUDA device. The allocations of torch are not part of the time: those of
the fake device are slower than real ones. Prints the least and the median thread time of 200 calls.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paramstats._core import backend
from tests.fake_cuda.building import FakeCuda

_ROOT = Path(__file__).parent.parent
_CALLS = 200
_DRIVER = """
#include <time.h>
long long first_call;  // thread time in nanoseconds; 0: none since it was set to 0
static int handle;
static int done(void) {
  struct timespec now;
  if (first_call == 0) {
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    first_call = now.tv_sec * 1000000000ll + now.tv_nsec;
  }
  return 0;
}
"""
_RETURNS_HANDLE = ("Retain", "LoadData", "GetKernel", "GetFunction", "GetDevicePointer")


def no_driver(folder: Path) -> ctypes.CDLL:
    """Build and load a driver whose functions return at once."""
    header = (_ROOT / "csrc/cuda/driver.h").read_text()
    source = _DRIVER
    for name in re.findall(r"X\((cu\w+),", header):
        sets_result = any(word in name for word in _RETURNS_HANDLE)
        result = "*out = &handle;" if sets_result else ""
        source += f"int {name}(void** out) {{ {result} return done(); }}\n"
    (folder / "driver.c").write_text(source)
    library = folder / "driver.so"
    command = ["cc", "-O2", "-w", "-shared", "-fPIC", str(folder / "driver.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def parameters(fake: Any, count: int) -> list[nn.Parameter]:
    """Return parameters of 16 elements with gradients, on a fake device."""
    made = []
    for _ in range(count):
        p = nn.Parameter(fake.to(torch.randn(16), 0))
        p.grad = fake.to(torch.randn(16), 0)
        made.append(p)
    return made


def measure(
    native: Any, driver: ctypes.CDLL, fake: Any, tensors: list[nn.Parameter]
) -> list[float]:
    """Return the seconds of each call."""
    first_call = ctypes.c_longlong.in_dll(driver, "first_call")
    host, device = fake.empty_pinned(1 << 24), fake.empty(1 << 24, 0)
    seconds = []
    for _ in range(_CALLS):
        begin = time.thread_time_ns()
        read = native.read(tensors, True, True, 1)
        (group,) = read[2]
        group.sizes()
        first_call.value = 0
        error = group.enqueue(host.data_ptr(), device.data_ptr(), 0)
        if error or group.replaced:
            sys.exit(error or "a tensor was replaced")
        seconds.append((first_call.value - begin) / 1e9)
        del read, group  # to free them is not a part of the next call
    return seconds


def main() -> None:
    native = backend.choose("native").native
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeCuda(Path(folder)).runtime
        driver = no_driver(Path(folder))
        assert not native.cuda_open(driver._name) and not native.cuda_load(0, b"no image")
        for count in (500, 5000):
            seconds = measure(native, driver, fake, parameters(fake, count))
            least, median = min(seconds), statistics.median(seconds)
            print(
                f"{2 * count:6,} tensors: least {1e6 * least:.0f} us, median {1e6 * median:.0f} us"
            )


if __name__ == "__main__":
    main()
