"""Training of what is quantized: distillation from the original, pruning, the resumable loop."""
