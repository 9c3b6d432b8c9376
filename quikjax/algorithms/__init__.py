"""Quantization algorithms, one a file: pure mathematics on a matrix."""
