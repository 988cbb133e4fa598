"""Benchmarks of paramstats against what it replaces and against the memory limit.

pytest benches --device cpu                  runs them
pytest benches -m "not large"                without the GiB-sized tensors
python -m benches.report                     runs them and writes the README's table
"""
