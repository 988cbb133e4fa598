"""Find the models of a diffusers pipeline: a folder that has a folder for each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paramstats.checkpoints._errors import brief, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._folders.subfolders import find_folders
from paramstats.checkpoints._stored_tensors import Contents

PIPELINE = "model_index.json"
_MAX_BYTES = 1 << 20


def components(files: Files, folder: Path) -> list[str]:
    """Return the folders with weights that a pipeline names; all of them if it names none."""
    path = folder / PIPELINE
    with files.open(path) as file:
        text = file.read(_MAX_BYTES + 1)
    try:
        named: Any = json.loads(text) if len(text) <= _MAX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise unexpected("a pipeline in JSON", brief(error), path) from None
    if not isinstance(named, dict):
        raise unexpected(f"a JSON object of at most {_MAX_BYTES:,} bytes", "another", path)
    named = {name for name in named if not name.startswith("_")}
    return [name for name in find_folders(folder, depth=1) if not named or name in named]


def with_prefix(contents: Contents, component: str) -> Contents:
    """Return contents with the name of their component before the name of every tensor."""
    tensors = [
        tensor._replace(
            name=f"{component}.{tensor.name}",
            aliases=tuple(f"{component}.{alias}" for alias in tensor.aliases),
            weight_name=f"{component}.{tensor.weight_name}" if tensor.weight_name else "",
        )
        for tensor in contents.tensors
    ]
    notes = tuple(f"{component}: {note}" for note in contents.notes)
    return contents._replace(tensors=tensors, notes=notes)
