"""Embeddings of texts, and their classes, by encoders. Programs are compiled once per bucket of lengths."""

from quikjax.encoding.classify import Classification, classify
from quikjax.encoding.embed import Embeddings, embed
from quikjax.encoding.text_encoder import TextEncoder

__all__ = ["Classification", "Embeddings", "TextEncoder", "classify", "embed"]
