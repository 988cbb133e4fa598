"""Readers of the formats of checkpoint files."""
