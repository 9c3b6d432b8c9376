"""Which artifacts can be recovered, as far as their configuration tells. Without JAX, so that a refusal costs no time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError
from quikjax.models.published import ENCODER_DECODERS, ENCODERS


def check_recoverable(config: Mapping[str, Any] | None, where: Path) -> dict[str, Any]:
    """The configuration of the artifact in `where`: a language model's, whose predictions are distilled, or an encoder's, whose
    hidden states are.

    Raises:
        QuikError: it is an encoder-decoder's, or there is none.
    """
    if config is None:
        raise QuikError(f"{where} holds parameters without a model; only artifacts of `quantize` can be recovered")
    kind = config.get("model_type")
    if kind in ENCODER_DECODERS:
        raise QuikError(f"{where} is an encoder-decoder ({kind}); recovery trains models that only decode or only encode")
    return dict(config)


def is_encoder(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration is an encoder's."""
    return config is not None and config.get("model_type") in ENCODERS
