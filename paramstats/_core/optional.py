"""Import optional dependencies on first use; name the missing library in the error."""

from __future__ import annotations

import importlib
from typing import Any


def import_optional(module: str, feature: str) -> Any:
    """Import and return `module`, which `feature` needs.

    >>> from paramstats._core.optional import import_optional
    >>> import_optional("matplotlib_", "History.plot")
    Traceback (most recent call last):
        ...
    ImportError: paramstats: History.plot needs matplotlib_: pip install matplotlib_

    Raises:
        ImportError: the library is not installed. The message names it and the command to install
            it, in one line. If the library is installed but fails to import one of its own
            dependencies, that error is raised unchanged.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"paramstats: {feature} needs {package}: pip install {package}", name=package
        ) from None
