"""Measuring models: perplexity with its standard error, divergence and agreement with another model."""

from quikjax.evaluation.perplexity import Evaluation, Reference, evaluate, reference, windows

__all__ = ["Evaluation", "Reference", "evaluate", "reference", "windows"]
