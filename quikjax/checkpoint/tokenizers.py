"""The tokenizer's files in an artifact: the published ones, or transformers' own, which any version from 4.57 on can open."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quikjax.checkpoint import atomic

# Arguments of `from_pretrained` that `save_pretrained` may write down. They are of the machine that loaded the tokenizer, not of
# the tokenizer, and would make two artifacts of the same model differ (or give away a token).
LOADING = frozenset(
    ["name_or_path", "is_local", "local_files_only", "cache_dir", "force_download", "proxies", "revision", "subfolder"]
).union(["token", "use_auth_token", "trust_remote_code", "_commit_hash", "_from_auto", "backend"])


SETTINGS = "tokenizer_config.json"


def save(tokenizer: Any | Sequence[Path], directory: Path) -> None:
    """Copy a published tokenizer's files, or write what `tokenizer.save_pretrained` writes, and wait until it is on disk."""
    if isinstance(tokenizer, Sequence):
        # All lie in one directory, chat templates perhaps in a folder of it.
        home = min((file.parent for file in tokenizer), key=lambda parent: len(parent.parts))
        for file in tokenizer:
            copy = directory / file.relative_to(home)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    else:
        tokenizer.save_pretrained(str(directory))
        settings = directory / SETTINGS
        if settings.is_file():
            kept = {name: value for name, value in _read(settings).items() if name not in LOADING}
            _write(settings, _for_any_version(kept))
    atomic.sync_tree(directory)


def export(stored: Path, directory: Path) -> None:
    """Copy a saved tokenizer's files beside the weights of an export: as they are, but for what transformers 4 could not read."""
    shutil.copytree(stored, directory, dirs_exist_ok=True)
    settings = directory / SETTINGS
    if settings.is_file():
        fields = _read(settings)
        if _for_any_version(fields) != fields:
            _write(settings, _for_any_version(fields))


def _read(settings: Path) -> dict[str, Any]:
    return dict(json.loads(settings.read_text(encoding="utf-8")))


def _write(settings: Path, fields: dict[str, Any]) -> None:
    settings.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _for_any_version(fields: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` that transformers 5 wrote, in words that transformers 4 knows too; any other as it is."""
    changed = dict(fields)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed
