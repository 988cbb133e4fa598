"""`python -m benches.on_gpu`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import paramstats
from benches import hardware, on_gpu
from benches.on_gpu import host_time, launches, repeatable, training

PARTS = {
    "host_time": host_time,
    "launches": launches,
    "repeatable": repeatable,
    "training": training,
}
"""What is measured, by the name that the report knows it under. Of each, `measure(device, quick)`
gives rows for JSON, and `lines(row)` what they say as text."""


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.on_gpu", description=on_gpu.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--quick", action="store_true", help="fewer calls and turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benches.on_gpu: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.cuda.init()  # before paramstats is asked what it can do there
    print(paramstats.backend(), hardware.describe("cuda")["hardware"], sep="\n", flush=True)
    report: dict[str, Any] = {**hardware.describe("cuda"), "quick": options.quick, "parts": {}}
    failed = False
    for name, part in PARTS.items():
        try:
            found = part.measure(device, options.quick)
        except Exception as error:  # the other parts are still worth having
            failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            report["parts"][name] = {"error": reason}
            print(f"{name}: FAILED, {reason}", flush=True)
        else:
            report["parts"][name] = found
            for row in found:
                print(*part.lines(row), sep="\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
