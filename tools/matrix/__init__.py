"""The compatibility matrix: common ways to build and train models, each compared with the oracle.

    python -m tools.matrix                every row; writes docs/compatibility.md
    python -m tools.matrix --only lora    rows with this word in their name or title

A row trains a real model for a few steps and calls `summarize` at each step with each backend.
"""
