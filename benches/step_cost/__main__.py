"""`python -m benches.step_cost`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import paramstats
from benches import hardware, step_cost
from benches.step_cost.measuring import lines, measure
from benches.step_cost.tools import available
from benches.step_cost.trainings import WORKS


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.step_cost", description=step_cost.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--quick", action="store_true", help="two turns: whether it runs at all")
    names = [work.name for work in WORKS]
    parser.add_argument("--only", default=",".join(names), help="of %(default)s")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(names):
        parser.error(f"expected --only of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {**hardware.describe("cpu"), "quick": options.quick, "steps": {}}
    print(paramstats.backend(), flush=True)
    with ExitStack() as stack:
        found, missing = available(stack)
        report["missing"] = missing
        for work in WORKS:
            if work.name in only:
                turns = 2 if options.quick else work.turns
                try:
                    measured = measure(work, found, turns)
                except ImportError as error:
                    missing[work.name] = str(error)
                    continue
                report["steps"][work.name] = measured
                print(*lines(measured), sep="\n", flush=True)
        for name, reason in missing.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
