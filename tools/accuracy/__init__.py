"""The error bound of docs/accuracy.md, checked on adversarial data; `python -m tools.accuracy`."""
