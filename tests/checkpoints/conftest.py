"""Fixtures for tests of the command line with checkpoints."""

from __future__ import annotations

import pytest

from paramstats._cli import main


@pytest.fixture
def shown(capsys):
    """A function that runs `paramstats show` and returns its output, and what is on stderr."""

    def run(*arguments: str) -> tuple[str, str]:
        assert main(["show", *map(str, arguments)]) == 0
        return capsys.readouterr()

    return run
