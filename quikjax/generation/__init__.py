"""Generation under `jit`."""

from quikjax.generation.decode import Generation, generate

__all__ = ["Generation", "generate"]
