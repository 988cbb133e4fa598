"""Show the weights of quantized checkpoints as values, or say that their elements are codes."""
