"""From dense weights to packed ones: a parameter tree, a model in memory, or a checkpoint on disk, block by block."""
