"""Benchmarks of paramstats against what it replaces and against the memory limit.

pytest benches --device cpu                  runs them
pytest benches --device cuda                 on a GPU
pytest benches -m "not large"                without the GiB-sized tensors
python -m benches.report                     runs them and writes the README's table
python -m benches.step_cost                  what a look adds to a training step, tool by tool
python -m benches.chart                      docs/speed.svg, from the newest results
python -m benches.compare REVISION           whether a change made it faster or slower
python -m benches.on_gpu                     what a call costs on a GPU beside its reading
python -m benches.gpu_check                  builds, tests and measures all that needs a GPU
"""
