"""Programs for developers: fuzzing, the compatibility matrix, sanitizers, builds elsewhere."""
