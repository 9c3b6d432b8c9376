"""A whole QUIK layer out of a split and a product, one file a backend."""
