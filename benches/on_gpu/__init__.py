"""What a call costs on a GPU beside its reading: the host's time, launches, waits, training steps.

    python -m benches.on_gpu --json out.json
    python -m benches.on_gpu --quick             fewer turns, for a look

Exits 2 where there is no CUDA device. The functions take any device, so that they can be tried.
"""
