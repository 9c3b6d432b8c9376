"""Token ids as people hand them over, checked against the model before anything is computed."""

import operator
from typing import Any

import numpy as np
from jaxtyping import Int32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models.base import CausalLM, Config, Transformer
from quikjax.models.encoder_decoder import EncoderDecoder, Writer


def checked_model(model: Any) -> CausalLM:
    """`model`, if it is one of ours that predicts the next token.

    Raises:
        QuikError: it is something else, such as the pair that `load` returns, or an encoder.
    """
    model = checked_transformer(model)
    if isinstance(model, CausalLM):
        return model
    raise not_causal(model)


def checked_writer(model: Any) -> Writer:
    """`model`, if it is one of ours that reads one text and writes another.

    Raises:
        QuikError: it is something else.
    """
    model = checked_transformer(model)
    if isinstance(model, Writer):
        return model
    if isinstance(model, CausalLM):
        raise QuikError(f"{type(model).__name__} continues a text and has no encoder to read one; give it to a Generator")
    raise not_causal(model)


def not_causal(model: Transformer) -> QuikError:
    """Why a model that is no `CausalLM` neither continues text nor has a perplexity, and what it is for."""
    name = type(model).__name__
    if isinstance(model, EncoderDecoder):
        use = "generate (in Python: TextToText)" if model.generates else "classify"
        return QuikError(
            f"{name} reads a whole text with an encoder and does not continue it, so that it neither chats nor has a perplexity; "
            f"use it with: quikjax {use}"
        )
    return QuikError(
        f"{name} is an encoder, which does not predict the next token, so that it neither continues text nor has a perplexity; "
        "use it with: quikjax embed, or quikjax classify where it has a classifier"
    )


def checked_transformer(model: Any) -> Transformer:
    """`model`, if it is one of ours, encoder or not.

    Raises:
        QuikError: it is something else, such as the pair that `load` returns.
    """
    if isinstance(model, Transformer):
        return model
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], Transformer):
        raise QuikError("a model is expected, not the pair that load returns; write: model, tokenizer = load(...)")
    raise QuikError(f"a model is expected, as load returns it, not {described(model)}")


def whole_number(value: Any, what: str, least: int | None = 1) -> int:
    """`value` as an int, NumPy's included.

    Raises:
        QuikError: it is none, or below `least`, if there is such a bound; `what` is what the message calls it.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise QuikError(f"{what} must be a whole number, not {described(value)}") from None
    if isinstance(value, bool):
        raise QuikError(f"{what} must be a whole number, not {value}")
    if least is not None and number < least:
        raise QuikError(f"{what} must be at least {least}, not {number}")
    return number


def checked_prompts(prompts: Any) -> list[list[int]]:
    """Prompts of any lengths as lists of ints, from rows of tokens or an array `[rows, length]` of any kind of integers.

    Raises:
        QuikError: they are texts, one row without its list, not whole numbers, or none at all.
    """
    if isinstance(prompts, str | bytes) or hasattr(prompts, "keys"):
        raise _not_tokens("prompts are", prompts)
    try:
        rows = list(prompts)
    except TypeError:  # nothing that has rows
        raise QuikError(f"prompts are rows of token ids, such as [[1, 2, 3]], not {described(prompts)}") from None
    if not rows:
        raise QuikError("there is no prompt; give at least one")
    found = []
    for row in rows:
        if isinstance(row, str | bytes) or hasattr(row, "keys"):
            raise _not_tokens("a prompt is", row)
        try:
            tokens = list(row)
        except TypeError:  # a number
            raise QuikError("prompts are rows of token ids; one row of tokens is [ids]") from None
        try:
            found.append([operator.index(token) for token in tokens])
        except TypeError:
            odd: Any = next(token for token in tokens if np.asarray(token).ndim or np.asarray(token).dtype.kind not in "iub")
            shown = described(odd if np.asarray(odd).ndim else np.asarray(odd).item())
            raise QuikError(f"a prompt holds {shown}, where whole numbers (token ids) are expected") from None
    return found


def _not_tokens(what: str, given: Any) -> QuikError:
    hint = 'take its "input_ids"' if hasattr(given, "keys") else "turn it into tokens first: quikjax.texts.tokenize"
    return QuikError(f"{what} {described(given)}, where token ids are expected; {hint}")


def checked_tokens(ids: Any, config: Config, what: str = "a batch of tokens") -> Int32[np.ndarray, "batch length"]:
    """Token ids as int32 `[batch, length]`, from an array of any kind of integers or rows of equal length.

    `what` is what messages call them.

    Raises:
        QuikError: they are not whole numbers, not in two dimensions, none at all, outside the vocabulary, or in rows longer than
            the model's context.
    """
    if isinstance(ids, str | bytes) or hasattr(ids, "keys"):
        hint = 'take its "input_ids"' if hasattr(ids, "keys") else "turn it into tokens first"
        raise QuikError(f"{what} is {described(ids)}, where token ids [batch, length] are expected; {hint}")
    try:
        array = np.asarray(ids)
    except ValueError:
        raise QuikError(f"{what} has rows of different lengths; give each length a batch of its own") from None
    if array.dtype.kind not in "iu" and array.size:
        raise QuikError(f"{what} holds {array.dtype.name}, where whole numbers (token ids) are expected")
    if array.ndim != 2:
        hint = "; one row of tokens is ids[None]" if array.ndim == 1 else ""
        raise QuikError(f"{what} has the shape {array.shape}, where [batch, length] is expected{hint}")
    if not array.size:
        raise QuikError(f"{what} has no tokens")
    if array.shape[1] > config.context_length:
        raise QuikError(
            f"{what} has {array.shape[1]} tokens in a row, which exceeds the model's context of {config.context_length}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= config.vocab_size:
        odd = low if low < 0 else high
        raise QuikError(
            f"{what} holds token {odd}, which is outside the model's vocabulary of {config.vocab_size}; is this its tokenizer?"
        )
    return array.astype(np.int32)
