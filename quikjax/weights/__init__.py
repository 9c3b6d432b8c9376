"""Packed weights, one small class per format; the linear layer that dispatches on their type; the same weights in training."""
