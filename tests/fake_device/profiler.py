"""Adds the calls and the work of the fake device to the results of `torch.profiler`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def install(fake: Any) -> None:
    """Replace `torch.profiler.profile`.

    Args:
        fake: the module of fake_device.cpp.
    """
    cuda = torch.profiler.ProfilerActivity.CUDA

    class Profile(torch.profiler.profile):
        """A profile whose activity CUDA is the fake device's."""

        def __init__(self, activities: Any = None, **options: Any) -> None:
            super().__init__(activities=[a for a in activities if a is not cuda], **options)
            self._calls: list[Any] = []

        def __enter__(self) -> Profile:
            super().__enter__()
            fake.start_profile()
            return self

        def __exit__(self, *error: Any) -> None:
            fake.log("cudaDeviceSynchronize")  # as the real one
            self._calls = fake.stop_profile()
            super().__exit__(*error)

        def events(self) -> Any:
            found = [SimpleNamespace(name=name) for _, name, *_ in self._calls]
            return [*super().events(), *found]

        def export_chrome_trace(self, path: str) -> None:
            super().export_chrome_trace(path)
            trace = json.loads(Path(path).read_text())
            base = trace.get("baseTimeNanoseconds", 0)
            for category, name, begin, end, correlation in self._calls:
                times = {"ts": (begin - base) / 1e3, "dur": (end - begin) / 1e3}
                event = {"ph": "X", "cat": category, "name": name, "args": {}} | times
                event["args"]["correlation"] = correlation
                trace["traceEvents"].append(event)
            Path(path).write_text(json.dumps(trace))

    torch.profiler.profile = Profile  # type: ignore[misc]
