"""Training of what is quantized: straight-through quantizers, distillation from the original, the resumable loop."""
