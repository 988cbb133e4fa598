"""The command `paramstats show`."""
