"""Studies: what decides the accuracy of a quantized model, measured."""
