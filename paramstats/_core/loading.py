"""Load the native module, and say why it cannot be used."""

from __future__ import annotations

import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from paramstats._core import torch_abi

_PACKAGE = Path(__file__).parent.parent
_FROM_SOURCE = "run pip install --force-reinstall --no-deps . in a checkout"
if (_PACKAGE.parent / "setup.py").exists():
    _FROM_SOURCE = (
        "run pip install --editable . here (this is the source checkout; an installed package is "
        "imported in other folders)"
    )
_REBUILD = (
    f"{_FROM_SOURCE}, with a C++ compiler, or pip install --force-reinstall --no-deps with a wheel "
    f"of paramstats for Python {platform.python_version()}"
)


def load() -> tuple[Any, str | None]:
    """Return the extension module and None, or None and the reason."""
    record = _build_record()
    if not record.get("native"):
        reason = record.get("reason") or f"it was never built in {_PACKAGE}"
        return None, f"the native backend is not installed: {reason}. To get it: {_REBUILD}"
    try:
        native = importlib.import_module("paramstats._native")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            error = ImportError("it was compiled for another version of Python")
        return None, f"the native backend does not load ({error}). To get it: {_REBUILD}"
    difference = torch_abi.connect(native)
    if difference:
        return None, (
            f"the native backend cannot be used with torch {torch.__version__}: {difference}. "
            f"Please report it"
        )
    return native, None


def _build_record() -> dict[str, Any]:
    """Return the record that setup.py wrote: what it built, and why not."""
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
