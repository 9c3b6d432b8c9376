"""Plan a quantization: bytes, shapes and kernels, before a weight is read."""
