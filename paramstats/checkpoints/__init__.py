"""Statistics of checkpoint files, which are neither loaded whole nor believed.

`summarize_file` reads one, `compare_files` what changed from one to another; `python -m paramstats
show` prints them.
"""

from paramstats.checkpoints._comparing import compare_files
from paramstats.checkpoints._comparison import Change, Comparison
from paramstats.checkpoints._stored import CheckpointError
from paramstats.checkpoints._summarizing import summarize_file

__all__ = ["Change", "CheckpointError", "Comparison", "compare_files", "summarize_file"]
