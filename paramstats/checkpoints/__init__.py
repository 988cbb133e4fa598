"""Read the statistics of checkpoint files in small pieces, without executing pickles.

`summarize_file` returns the statistics of one checkpoint. `compare` returns what changed between
two, or between a checkpoint and a model in memory. `compare_files` is another name of `compare`.
`paramstats show` prints both on the command line.
"""

from paramstats._core.record import FileSource
from paramstats.checkpoints._compare.compare import compare, compare_files
from paramstats.checkpoints._compare.comparison import Change, Comparison, GroupChange
from paramstats.checkpoints._errors import CheckpointError
from paramstats.checkpoints._summarize_file import summarize_file

__all__ = [
    "Change",
    "CheckpointError",
    "Comparison",
    "FileSource",
    "GroupChange",
    "compare",
    "compare_files",
    "summarize_file",
]
