"""Measuring models: perplexity with its standard error, divergence and agreement with another model, errors by layer, tasks."""

from quikjax.evaluation.distance import Distance
from quikjax.evaluation.perplexity import Evaluation, Reference, evaluate, reference, windows

__all__ = ["Distance", "Evaluation", "Reference", "evaluate", "reference", "windows"]
