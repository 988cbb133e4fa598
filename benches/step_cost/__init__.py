"""Measures how much time each tool adds to a training step."""
