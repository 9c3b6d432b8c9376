"""Flax NNX definitions: one file per published `model_type`, found by `registry`."""
