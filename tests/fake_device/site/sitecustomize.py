"""Installs the fake device once torch has been imported. Python imports this file at its start."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                from tests import fake_device

                fake_device.install()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "PARAMSTATS_FAKE_DEVICE" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
