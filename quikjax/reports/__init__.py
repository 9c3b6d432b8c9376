"""Reports on artifacts: what was quantized, how well, and how large it is."""
