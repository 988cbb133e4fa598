"""Cases made from a number: the same number makes the same case, anywhere.

`python -m tests.fuzz` is the campaign; `python -m tests.fuzz --only tensors --seed 7` is one case.
An execution is one call of an entry of paramstats whose outcome was checked.
"""
