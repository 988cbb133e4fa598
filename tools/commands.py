"""Programs that a developer's command needs: what they print, or an end with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(
    *command: str, cwd: str | Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Ends the program where the command fails, with what that said. It does not see which
    paramstats is to be imported here, nor which backend is forced, but by `environment`."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PARAMSTATS_BACKEND")}
    done = subprocess.run(command, cwd=cwd, env=keep | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done
