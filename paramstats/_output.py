"""Write the output of a command, and its errors as single lines with an exit status."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable

from paramstats._core.format import elide, one_line_name

ERROR = 2
"""Exit status after an error, which is one line on stderr."""

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells report it."""

BROKEN_PIPE = 141
"""Exit status of a program whose reader closed the pipe, as shells report it."""

_MAX_LINE_LENGTH = 1000


def run(command: str, make_text: Callable[[], str]) -> int:
    """Print the text that a command makes, and return the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have any characters
    try:
        return write(command, make_text())
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        path = elide(str(error.filename), _MAX_LINE_LENGTH // 2)
        place = "" if error.filename is None else f"cannot read {path}: "
        return fail(command, f"{place}{error.strerror or error}")
    except (ValueError, RuntimeError, re.error) as error:
        return fail(command, str(error) or type(error).__name__)
    except Exception as error:
        reason = f": {error}" if str(error) else ""
        return fail(command, f"{type(error).__name__}{reason}")


def write(command: str, text: str) -> int:
    """Write to standard output and flush it; return the exit status."""
    if sys.stdout is None:
        return fail(command, "expected an open standard output, but it is closed")
    try:
        for line in text.splitlines(keepends=True):  # one write could lose its error
            sys.stdout.write(line)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second error at exit
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        return fail(command, f"cannot write to standard output: {error.strerror}")
    return 0


def fail(command: str, message: str) -> int:
    """Print an error and return its exit status."""
    if not message.startswith("paramstats"):
        message = f"{command}: {message}"
    print_error(command, message)
    return ERROR


def print_error(command: str, message: str) -> None:
    """Print a message on stderr as one line; one of paramstats gets the name of the command."""
    message = re.sub(r"^paramstats[\w.]*:", f"{command}:", message)
    line = one_line_name(" ".join(message.split()))
    if len(line) > _MAX_LINE_LENGTH:
        line = f"{line[:_MAX_LINE_LENGTH]} ..."
    with contextlib.suppress(OSError):  # the exit status still reports the error
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
