"""The error bound of docs/accuracy.md against exact arithmetic: `python -m tests.accuracy`."""
