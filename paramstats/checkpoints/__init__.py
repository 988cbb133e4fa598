"""Read the statistics of checkpoint files in small pieces, without executing pickles.

`summarize_file` returns the statistics of one checkpoint. `compare_files` returns what changed
between two. `paramstats show` prints both on the command line.
"""

from paramstats.checkpoints._compare_files import compare_files
from paramstats.checkpoints._comparison import Change, Comparison
from paramstats.checkpoints._errors import CheckpointError
from paramstats.checkpoints._summarize_file import summarize_file

__all__ = ["Change", "CheckpointError", "Comparison", "compare_files", "summarize_file"]
