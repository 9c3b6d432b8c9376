"""A generator of the kind that a model needs, and one call that makes it and generates."""

from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from flax import nnx

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.generation.generator import Generator, Prompts
from quikjax.generation.rows import Generation
from quikjax.generation.text_to_text import TextToText
from quikjax.models.encoder_decoder import EncoderDecoder


def generator_of(model: Any, **settings: Any) -> Generator:
    """A `TextToText` for a model that reads one text and writes another, a `Generator` for any other; `settings` are theirs.

    Raises:
        QuikError: as they do.
    """
    return (TextToText if isinstance(model, EncoderDecoder) else Generator)(model, **settings)


def generate(
    graphdef: nnx.GraphDef[Any],
    params: Mapping[str, Any],
    ids: Prompts,
    *,
    max_new_tokens: int = 64,
    stop: SupportsIndex | Iterable[Any] | None = None,
    **settings: Any,
) -> Generation:
    """Continue prompts, or write of the texts that they are: `generator_of(model).generate(ids, ...)`, made for this call.

    Blocks are stacked (and held a second time meanwhile) and programs compiled for every call; who generates more than once keeps
    a `Generator`.

    Args:
        graphdef: `nnx.split(model)[0]`.
        params: nested dictionaries, dense or with packed weights.
        ids, max_new_tokens, stop, settings: see `Generator.generate`.

    Raises:
        QuikError: as `Generator.generate`.
    """
    if not isinstance(graphdef, nnx.GraphDef):
        raise QuikError(f"a model's definition is expected, nnx.split(model)[0], not {described(graphdef)}")
    try:
        model = nnx.merge(graphdef, params)
    except (KeyError, ValueError):
        raise QuikError("the parameters are not those of the model's definition; both are of nnx.split(model)") from None
    return generator_of(model).generate(ids, max_new_tokens=max_new_tokens, stop=stop, **settings)
