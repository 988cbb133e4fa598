"""The private core: tensors to moments, without presentation."""
