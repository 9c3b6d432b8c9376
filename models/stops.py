"""Token ids that end a text, as a checkpoint's files name them."""

from collections.abc import Iterable, Mapping
from typing import Any

from quikjax.errors import QuikError


def named_stops(fields: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The ids that `eos_token_id` of a `config.json` or a `generation_config.json` names: none, one or several.

    Negative ids, with which some checkpoints say that they have none, are passed over.

    Raises:
        QuikError: the field holds something else, in the file called `where`.

    >>> named_stops({"eos_token_id": [128001, 128009]}, "config.json"), named_stops({"eos_token_id": None}, "config.json")
    ((128001, 128009), ())
    """
    value = fields.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise QuikError(f"{where} has eos_token_id = {value!r}, which should be a token's number or a list of them")
    return tuple(token for token in ids if token >= 0)


def union_of_stops(vocab_size: int, *named: Iterable[int]) -> tuple[int, ...]:
    """Every id that any of `named` holds, once, in order; without those that no token of the model's vocabulary has.

    >>> union_of_stops(10, [7, 2], [2, 12])
    (2, 7)
    """
    return tuple(sorted({token for ids in named for token in ids if 0 <= token < vocab_size}))
