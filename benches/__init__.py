"""Benchmarks of paramstats against other ways to compute the statistics, and the memory limit.

pytest benches --device cuda       run them on a GPU (default: the CPU)
pytest benches -m "not large"      run them without tensors of 1 GiB
python -m benches.report           run them and write docs/benchmarks.md
python -m benches.step_cost        measure what each tool adds to a training step
python -m benches.in_turns         time paramstats, its limits and the loop in alternating calls
python -m benches.chart            draw docs/speed.svg from the newest results
python -m benches.compare REV      compare the speed with that of another revision
python -m benches.sharded          measure the exchange between ranks
python -m benches.on_gpu           measure what a call costs on a GPU
python -m benches.gpu_check        build, test and measure everything on a GPU
"""
