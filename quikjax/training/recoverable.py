"""Which artifacts can be recovered, as far as their configuration tells. Without JAX, so that a refusal costs no time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError
from quikjax.models.published import ENCODER_DECODERS, ENCODERS


def check_decoder(config: Mapping[str, Any] | None, where: Path) -> dict[str, Any]:
    """The configuration of the artifact in `where`, if it is that of a language model: its predictions are what is distilled.

    Raises:
        QuikError: it is an encoder's or an encoder-decoder's, or there is none.
    """
    if config is None:
        raise QuikError(f"{where} holds parameters without a model; only artifacts of `quantize` can be recovered")
    kind = config.get("model_type")
    if kind in ENCODERS:
        raise QuikError(
            f"{where} is an encoder ({kind}), and recovery trains language models; an encoder with a classifier is trained in "
            "its quantized form by: quikjax train"
        )
    if kind in ENCODER_DECODERS:
        raise QuikError(f"{where} is an encoder-decoder ({kind}), and recovery trains models that only decode")
    return dict(config)
