"""Choose which files of a folder make up a checkpoint."""
