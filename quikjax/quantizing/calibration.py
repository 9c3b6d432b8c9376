"""Calibration tokens of a text, in the form that a model reads texts in."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from quikjax.models.base import CausalLM, Transformer
from quikjax.texts import calibration_windows, framed_windows, tokenize


def calibration_tokens(
    model: Transformer, tokenizer: Any, text: str, samples: int, length: int
) -> Int32[np.ndarray, "samples length"]:
    """The first `samples` windows of `length` tokens of a text.

    A model that predicts the next token reads them as they stand. An encoder reads whole texts, and gets each window between the
    tokens that its tokenizer puts around one ([CLS] and [SEP]). So does an encoder-decoder, whose decoder is fed the same window
    one place to the right, as if it were to repeat the text: no other text belongs to it, and BART was pretrained so.

    Raises:
        QuikError: the text is too short, or a number is not positive.
    """
    if isinstance(model, CausalLM):
        return calibration_windows(tokenize(tokenizer, text), samples, length)
    return framed_windows(tokenizer, text, samples, length)
