"""Runs programs for the other tools and ends with their output where they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(
    *command: str, cwd: str | Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command; ends this program with the command's output where it fails.

    PYTHONPATH and PARAMSTATS_BACKEND are removed from the environment unless they are given.
    """
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PARAMSTATS_BACKEND")}
    done = subprocess.run(command, cwd=cwd, env=keep | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done
