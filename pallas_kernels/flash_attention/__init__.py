"""Attention on a GPU without its scores in memory (FlashAttention-2, arXiv 2307.08691; split along keys as Flash-Decoding does).

`choice` says which calls the kernels take, and why not the others; `decode` reads the keys of a cache of all blocks where they
lie, `prefill` those of the same call. The definition is the caller's (`models.attention`), and runs whatever is refused. Kernels
are written in Pallas and lowered through Triton, which XLA compiles for Ampere, Ada and Hopper; `interpret` runs them on a CPU.
"""
