"""Trainers that have a loop of their own: a callback for each, imported by whoever uses it."""
