"""Packed weights, one small class per format, and the linear layer that dispatches on their type."""
