"""Runs cases in a child process of the campaign, or in a debugger.

    gdb --args python -m tools.fuzz.child KIND SEED COUNT [PROGRESS]

The last line that it prints is for the campaign: executions, wrong cases and the next seed as JSON.
PROGRESS is a file that holds the seed of the current case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tools.fuzz import campaign

kind, seed, count, *progress = sys.argv[1:]
print(json.dumps(campaign.run_here(kind, int(seed), int(count), *map(Path, progress))))
