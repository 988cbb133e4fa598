"""Read the quantization method from config.json, as Hugging Face writes it next to the weights."""

from __future__ import annotations

import json
import os
from typing import Any

from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import StoredTensor

_MAX_BYTES = 1 << 20


class Config:
    """The quantization methods of checkpoint folders."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._found: dict[str, dict[str, Any]] = {}

    def quantization(self, tensor: StoredTensor) -> tuple[str | None, str | None]:
        """Return the method, such as "gptq", and the format, such as "gptq_v2"; None if unknown."""
        folder = os.path.dirname(tensor.parts[0].path) if tensor.parts else ""
        if folder not in self._found:
            self._found[folder] = self._read(folder)
        config = self._found[folder]
        method, form = (
            next((value.lower() for key in keys if isinstance(value := config.get(key), str)), None)
            for keys in (("quant_method",), ("checkpoint_format", "version"))
        )
        return method, form

    def _read(self, folder: str) -> dict[str, Any]:
        for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                continue
            with self._files.open(path) as file:
                text = file.read(_MAX_BYTES)
            try:
                config = json.loads(text)
            except (ValueError, RecursionError):
                continue
            found = config.get(key) if key and isinstance(config, dict) else config
            if isinstance(found, dict):
                return found
        return {}
