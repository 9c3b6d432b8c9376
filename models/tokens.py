"""Token ids as people hand them over, checked against the model before anything is computed."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models.base import CausalLM, Config, Transformer


def checked_model(model: Any) -> CausalLM:
    """`model`, if it is one of ours that predicts the next token.

    Raises:
        QuikError: it is something else, such as the pair that `load` returns, or an encoder.
    """
    model = checked_transformer(model)
    if isinstance(model, CausalLM):
        return model
    raise not_causal(type(model).__name__)


def not_causal(name: str) -> QuikError:
    """Why an encoder, a model of class `name`, neither generates nor has a perplexity, and what it is for."""
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
