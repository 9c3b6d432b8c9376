"""Calibration tokens of a text, in the form that a model reads texts in."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from quikjax.models.base import CausalLM, Transformer
from quikjax.models.encoder import Encoder
from quikjax.texts import calibration_windows, framed_windows, tokenize

_SAMPLES, _LENGTH = 16, 2048
# Of an encoder. Its texts are short, and errors are smallest where calibration is on texts of the length that is read later
# (benchmarks/notes-encoders.md): between sentences and pages.
_ENCODER_TOKENS, _ENCODER_LENGTH = 8192, 128


def calibration_size(model: Transformer, samples: int | None = None, seqlen: int | None = None) -> tuple[int, int]:
    """The number of calibration sequences, and of tokens in each, where one or both are left out.

    Of a model that decodes, 16 of 2048 tokens or the context; of an encoder 8192 tokens in all, 128 a sequence.
    """
    context = model.config.context_length
    if not isinstance(model, Encoder):
        return _SAMPLES if samples is None else samples, min(_LENGTH, context) if seqlen is None else seqlen
    length = min(_ENCODER_LENGTH, context) if seqlen is None else seqlen
    return max(1, _ENCODER_TOKENS // max(length, 1)) if samples is None else samples, length


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
