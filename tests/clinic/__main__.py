"""Run the clinic: `python -m tests.clinic`; print a table and the scores of the two halves."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.clinic.judge import Verdict, judge
from tests.clinic.runner import record, replay
from tests.clinic.training import Case

SCORE = 0.95
"""The share of the diseases of a half that must be named."""


def cases() -> list[Case]:
    """Return all cases, the sick ones first."""
    from tests.clinic.healthy import HEALTHY
    from tests.clinic.sick import SICK

    return SICK + HEALTHY


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clinic", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression of names")
    parser.add_argument("--half", choices=("set", "judged"), help="this half only")
    parser.add_argument("--kind", choices=("sick", "healthy"), help="this kind only")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write the histories there")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="judge those of a folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--verbose", action="store_true", help="print the texts of all alarms")
    arguments = parser.parse_args()

    def selected(name: str, half: str, codes: object) -> bool:
        kind = "sick" if codes else "healthy"
        wanted = arguments.half in (None, half) and arguments.kind in (None, kind)
        return wanted and bool(re.search(arguments.pattern, name))

    names = [c.name for c in cases() if selected(c.name, c.half, c.codes)]
    if arguments.record:
        arguments.record.mkdir(parents=True, exist_ok=True)
    work = partial(_run, folder=arguments.record, recorded=arguments.replay)
    verdicts = []
    with ProcessPoolExecutor(arguments.jobs, initializer=_quiet) as pool:
        for verdict in pool.map(work, names):
            verdicts.append(verdict)
            print(line(verdict), flush=True)
            if arguments.verbose:
                for view, found in verdict.alarms.items():
                    for step, finding in found:
                        print(f"    {view} at step {step}: {finding}")
    if arguments.record:
        write_index(arguments.record)
    return report(verdicts)


def _quiet() -> None:
    """Use one thread in each process, and silence the libraries' notes on tiny models."""
    import logging
    import warnings

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for library in ("transformers", "lightning.pytorch"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _run(name: str, folder: Path | None, recorded: Path | None) -> Verdict:
    case = next(case for case in cases() if case.name == name)
    verdict = judge(replay(case, recorded) if recorded else record(case, folder))
    # Processes send verdicts to each other, but cannot send functions without a name.
    return replace(verdict, case=replace(case, make=_run))


def write_index(folder: Path) -> None:
    """Write the fields of all recordings of a folder to its index.json."""
    entries = []
    for path in sorted(folder.glob("*.json")):
        if path.name != "index.json":
            entries.append({**json.loads(path.read_text()), "file": path.stem})
    (folder / "index.json").write_text(json.dumps(entries))


def line(verdict: Verdict) -> str:
    """Return a row of the table."""
    case = verdict.case
    if case.codes:
        found = {view: hit for view, hit in verdict.named.items() if hit}
        word = "named" if found else "MISSED"
        ordered = sorted(found.items(), key=lambda item: item[1][0])
        texts = [
            f"{view}: {f.code.name} {f.name or '(model)'} at step {step}"
            for view, (step, f) in ordered
        ]
        early = sum(map(len, verdict.alarms.values()))
        texts += [f"{early} alarms before the onset"] if early else []
    else:
        word = "quiet" if verdict.right else "ALARM"
        texts = []
        for view, found in verdict.alarms.items():
            codes = sorted({f.code.name for _, f in found})
            if found:
                step, first = found[0]
                texts.append(f"{view}: {', '.join(codes)} {first.name or '(model)'} at step {step}")
    loss = f"{number(verdict.first_loss)} -> {number(verdict.last_loss)}"
    return f"{word:6} {case.half:6} {case.name:40} {loss:22} {'; '.join(texts)}"


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "nan"


def report(verdicts: list[Verdict]) -> int:
    """Print the scores; return the exit status."""
    status = 0
    for half in ("set", "judged"):
        of_half = [v for v in verdicts if v.case.half == half]
        sick, healthy = ([v for v in of_half if bool(v.case.codes) == k] for k in (True, False))
        named, quiet = (sum(v.right for v in part) for part in (sick, healthy))
        views = {view: sum(v.named.get(view) is not None for v in sick)
                 for v in sick for view in v.named}  # fmt: skip
        print(f"\n{half}: {named} of {len(sick)} diseases named, "
              f"{quiet} of {len(healthy)} healthy trainings quiet")  # fmt: skip
        print("   named by view: " + ", ".join(f"{view} {n}" for view, n in views.items()))
        alarms = {view: sum(bool(v.alarms.get(view)) for v in healthy)
                  for v in healthy for view in v.alarms}  # fmt: skip
        print("   alarms by view: " + ", ".join(f"{view} {n}" for view, n in alarms.items()))
        if half == "judged" and (named < SCORE * len(sick) or quiet < len(healthy)):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
