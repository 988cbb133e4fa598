"""Cases made from a number: the same number makes the same case, anywhere.

`python -m tools.fuzz` is the campaign; `--only tensors --seed 7 --count 1` is one case of it.
An execution is one call of an entry of paramstats whose outcome was checked.
"""
