"""Read pickles as plain data, without executing them, and find the tensors in them."""
