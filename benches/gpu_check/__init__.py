"""Builds, tests, checks and measures on a machine with a GPU, in one command of under ten minutes.

    python -m benches.gpu_check [--out DIR] [--quick] [--dry-run]

Needs no network, and in the Python that runs it torch with CUDA, setuptools 77 or later, ninja,
pybind11, pytest, pytest-benchmark, hypothesis, numpy, pandas, scikit-learn and transformers. Every
step has a limit of its own and none stops the next one; at the end stands a
table of them, and the exit status is 1 where one failed. DIR (default: $OUT, else build/gpu-check)
gets gpu-check.json and gpu-check.log, on-gpu.json, and benchmark.json, from which

    python -m benches.report --json DIR/benchmark.json --on-gpu DIR/on-gpu.json

writes benches/results and the README's tables, on any machine.
"""
