"""`python -m benches.gpu_check`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benches import gpu_check
from benches.gpu_check.running import ROOT, Outcome, run
from benches.gpu_check.steps import BUDGET, environment, steps


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each step."""
    width = max(len(o.name) for o in outcomes)
    return "\n".join(
        f"{o.name:<{width}}  {o.result}  {o.seconds:6.1f} s  {o.reason}".rstrip() for o in outcomes
    )


def _measured(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.gpu_check", description=gpu_check.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    parser.add_argument("--out", type=Path, default=default, help="folder for what was found")
    parser.add_argument("--quick", action="store_true", help="memcheck and small benchmarks only")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and limits")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    todo = steps(out, options.quick)
    if options.dry_run:
        for step in todo:
            extra = " ".join(f"{name}={value}" for name, value in step.environment.items())
            note = f"  [skip: {step.impossible}]" if step.impossible else ""
            print(f"{step.name} (at most {step.limit:.0f} s){note}")
            print(f"    {extra} {' '.join(step.command).strip()}".replace("     ", "    "))
        return 0

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    for stale in (log, out / "on-gpu.json", out / "benchmark.json"):
        stale.unlink(missing_ok=True)
    surroundings = environment()
    print(f"for architecture {surroundings.get('TORCH_CUDA_ARCH_LIST', '(none found)')}")
    outcomes: list[Outcome] = []
    for step in todo:
        left = BUDGET - (time.monotonic() - begin)
        outcomes.append(run(step, left, log, surroundings))
        report = {
            "steps": [asdict(outcome) for outcome in outcomes],
            "seconds": time.monotonic() - begin,
            "on_gpu": _measured(out / "on-gpu.json"),
        }
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        if step.essential and outcomes[-1].result == "FAIL":
            print(f"== without {step.name} the rest is worth nothing")
            break
    print(f"\n{table(outcomes)}\n{out}")
    return 1 if any(outcome.result == "FAIL" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
