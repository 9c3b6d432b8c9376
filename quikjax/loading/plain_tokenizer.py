"""The part of a tokenizer that generating takes, without `transformers`: its import takes longer than to read a small model."""

from collections.abc import Mapping, Sequence
from typing import Any


class PlainTokenizer:
    """Encodes and decodes as the `transformers` tokenizer over the same `tokenizers.Tokenizer` does, token for token."""

    def __init__(self, core: Any, special: Mapping[str, str]) -> None:
        self._core = core
        end = special.get("eos_token")
        self.eos_token_id: int | None = None if end is None else core.token_to_id(end)

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        """The tokens of one text, `{"input_ids": [...]}`. There is nothing to be `verbose` about."""
        return {"input_ids": self._core.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        """The text of tokens.

        Raises:
            NotImplementedError: spaces are to be cleaned up, which nothing that generates asks for.
        """
        if clean_up_tokenization_spaces:
            raise NotImplementedError("a plain tokenizer does not clean up spaces")
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special_tokens))


def is_enough(core: Any, special: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether `transformers` would take over `core` as it is, with these special tokens and other settings.

    It adds special tokens that are not among the added ones, and refuses settings that are none.
    """
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    return (
        added.issuperset([*special.values(), *fields.get("additional_special_tokens", ())])
        and all(fields.get(side, "right") in ("left", "right") for side in ("padding_side", "truncation_side"))
        and isinstance(fields.get("model_max_length", 0), int | float)
        and isinstance(fields.get("clean_up_tokenization_spaces", False), bool)
    )
