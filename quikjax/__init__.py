"""quikjax: published language models in QUIK 4-bit format, in JAX."""

__version__ = "0.1.0"
