"""Artifacts: a model on disk, with everything needed to use it and to know what it is.

    DIR/quikjax.json          the manifest: configuration, recipe, provenance, parts, fingerprint
    DIR/arrays/NAME/          one part's arrays (Orbax); a part is a transformer block, or "rest"
    DIR/arrays/NAME.json      one part's manifest: dtype, shape and SHA-256 of every array, static fields, files
    DIR/tokenizer/            the source's own files, or as transformers saves it; absent without one
    DIR/generation_config.json   which tokens end a text, and what else the source's said; absent where it said nothing
    DIR/report.jsonl          one line per layer; absent without one
    DIR/log.jsonl             what was done when; not in the manifest, because no two runs are equally fast

Saving the same twice gives the same bytes, but for that log. What the manifest does not list (`.DS_Store`, a README, `.git`) is
no damage: it is not read, and stays when the artifact is replaced. A killed save leaves the old artifact or none. Restored arrays
have the bits that were saved, or an error names the file that changed.

Names are imported when they are first used: to find an artifact, or that there is none, takes no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quikjax.checkpoint.artifact import restore, restore_params, save, split_parts
    from quikjax.checkpoint.artifact_sizes import Sizes, sizes
    from quikjax.checkpoint.manifest import Manifest, Part
    from quikjax.checkpoint.parts import REST
    from quikjax.checkpoint.reader import Reader, read_manifest
    from quikjax.checkpoint.writer import Writer

_HOME = {
    "REST": "parts",
    "Manifest": "manifest",
    "Part": "manifest",
    "Reader": "reader",
    "Sizes": "artifact_sizes",
    "Writer": "writer",
    "read_manifest": "reader",
    "restore": "artifact",
    "restore_params": "artifact",
    "save": "artifact",
    "sizes": "artifact_sizes",
    "split_parts": "artifact",
}

__all__ = [
    "REST",
    "Manifest",
    "Part",
    "Reader",
    "Sizes",
    "Writer",
    "read_manifest",
    "restore",
    "restore_params",
    "save",
    "sizes",
    "split_parts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
