"""The settings beside a tokenizer's vocabulary: which tokens are special, which were added, how a chat is written.

`tokenizer_config.json` speaks first, then `special_tokens_map.json`; a chat template in a file of its own replaces theirs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quikjax.errors import QuikError
from quikjax.files import read_json, read_text

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of the other fields, those that a wrapped tokenizer takes and that leave the tokens of a text alone.
_PASSED = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names")


class Settings(NamedTuple):
    """The settings of a published tokenizer.

    `special` holds the text of each role's token, `more_special` of those without a role; `added` the published description of
    each added token by its id, where one is published; `fields` all of `tokenizer_config.json`.
    """

    special: dict[str, str]
    more_special: list[str]
    added: dict[int, Mapping[str, Any]]
    chat_template: str | dict[str, str] | None
    fields: Mapping[str, Any]

    @property
    def passed(self) -> dict[str, Any]:
        """The fields that a wrapped tokenizer takes as they are."""
        return {name: self.fields[name] for name in _PASSED if self.fields.get(name) is not None}


def read_settings(directory: Path) -> Settings:
    """The settings in a Hugging Face directory; empty where it has none.

    Raises:
        QuikError: a file is damaged, or says something that no setting can be.
    """

    def optional(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).is_file() else {}

    fields = optional("tokenizer_config.json")
    first, second = fields, optional("special_tokens_map.json")
    try:
        named = {role: _text(first.get(role)) or _text(second.get(role)) for role in ROLES}
        more = [token for source in (first, second) for token in _more(source)]
        added: dict[int, Mapping[str, Any]] = {
            int(token): {"content": content, "special": False} for content, token in optional("added_tokens.json").items()
        }
        added |= {int(token): dict(described) for token, described in (fields.get("added_tokens_decoder") or {}).items()}
        template = _chat_template(directory, fields, optional("chat_template.json"))
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise QuikError(f"the tokenizer in {directory} cannot be read: its settings are damaged ({problem})") from None
    special = {role: token for role, token in named.items() if token}
    return Settings(special, list(dict.fromkeys(more)), added, template, fields)


def _text(token: Any) -> str | None:
    """A token as configurations write it: its text, or an object that holds it."""
    return token["content"] if isinstance(token, Mapping) else token if isinstance(token, str) else None


def _more(fields: Mapping[str, Any]) -> list[str]:
    listed: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = fields.get(name) or []
        listed += list(value.values()) if isinstance(value, Mapping) else list(value)
    return [text for text in map(_text, listed) if text]


def _chat_template(directory: Path, fields: Mapping[str, Any], older: Mapping[str, Any]) -> str | dict[str, str] | None:
    template: Any = older.get("chat_template", fields.get("chat_template"))
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    single = directory / "chat_template.jinja"
    if single.is_file():
        template = read_text(single)
    named = {file.stem: read_text(file) for file in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    if named:
        template = {**({"default": template} if isinstance(template, str) else template or {}), **named}
    return template
