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


def save(tokenizer: Any | Sequence[Path], directory: Path) -> None:
    """Copy a published tokenizer's files, or write what `tokenizer.save_pretrained` writes, and wait until it is on disk."""
    if isinstance(tokenizer, Sequence):
        directory.mkdir(exist_ok=True)
        for file in tokenizer:
            shutil.copyfile(file, directory / file.name)
    else:
        tokenizer.save_pretrained(str(directory))
        settings = directory / "tokenizer_config.json"
        if settings.is_file():
            fields = _for_any_version(json.loads(settings.read_text(encoding="utf-8")))
            settings.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    atomic.sync_tree(directory)


def _for_any_version(fields: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` that transformers 5 wrote, in words that transformers 4 knows too."""
    kept = {name: value for name, value in fields.items() if name not in LOADING}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept
