"""Libraries that only some features need: imported where they are used, named where they lack."""

from __future__ import annotations

import importlib
from typing import Any


def import_optional(module: str, feature: str, extra: str) -> Any:
    """The module called `module`, or an ImportError in one line that says what to install.

    >>> from paramstats._core.optional import import_optional
    >>> import_optional("matplotlib_", "history.plot", "plot")
    Traceback (most recent call last):
        ...
    ImportError: paramstats: history.plot needs matplotlib_: pip install 'paramstats[plot]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there; something that it imports is not
        raise ImportError(
            f"paramstats: {feature} needs {package}: pip install 'paramstats[{extra}]'",
            name=package,
        ) from None
