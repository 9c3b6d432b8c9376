"""How codes are found: one algorithm a file, pure mathematics on a matrix."""
