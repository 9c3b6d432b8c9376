"""Kernels: arrays in, arrays out. Imports jax and nothing of ours.

`reference` is the definition of the numbers; every other backend is tested against it.
"""
