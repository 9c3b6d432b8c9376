"""The tokenizer's files in an artifact: transformers' own, without what it notes about where a tokenizer came from."""

import json
from pathlib import Path
from typing import Any

from quikjax.checkpoint import atomic

# Arguments of `from_pretrained` that `save_pretrained` may write down. They are of the machine that loaded the tokenizer, not of
# the tokenizer, and would make two artifacts of the same model differ (or give away a token).
LOADING = frozenset(
    ["name_or_path", "is_local", "local_files_only", "cache_dir", "force_download", "proxies", "revision", "subfolder"]
).union(["token", "use_auth_token", "trust_remote_code", "_commit_hash", "_from_auto"])


def save(tokenizer: Any, directory: Path) -> None:
    """Write what `tokenizer.save_pretrained` writes, and wait until it is on disk."""
    tokenizer.save_pretrained(str(directory))
    settings = directory / "tokenizer_config.json"
    if settings.is_file():
        fields = json.loads(settings.read_text(encoding="utf-8"))
        kept = {name: value for name, value in fields.items() if name not in LOADING}
        settings.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    atomic.sync_tree(directory)


def load(directory: Path) -> Any:
    """The tokenizer in `directory`, without a look at the network."""
    from quikjax.loading.tokenizer import import_transformers

    return import_transformers().AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
