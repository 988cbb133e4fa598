"""Runs Python with the fake device: `python -m tests.fake_device [-m MODULE | FILE | -c CODE]`."""

import os
import sys

from tests import fake_device

found = {**os.environ, **fake_device.environment(fake_device.build())}
os.execve(sys.executable, [sys.executable, *sys.argv[1:]], found)  # noqa: S606
