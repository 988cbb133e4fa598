"""A fuzzer: every test case follows from a number, so that it can be repeated anywhere.

    python -m tools.fuzz                                    a million executions, 12 minutes
    python -m tools.fuzz --scale 0.001                      a thousand executions
    python -m tools.fuzz --only modules --seed 4 --count 1  one case

An execution is one call of paramstats whose result was checked. Each kind of case is a module with
a function `run(seed)`, which returns the number of executions and raises where a result is wrong.
"""
