"""The command that makes an artifact again, from what its manifest says. Names in it are checked against fingerprints."""

import dataclasses
import shlex
from typing import Any

from quikjax.checkpoint import Reader
from quikjax.errors import QuikError
from quikjax.loading import DEMO_MODELS, open_source
from quikjax.models.registry import abstract_model
from quikjax.quantizing.calibration import calibration_tokens
from quikjax.quantizing.recipe import RECIPES
from quikjax.texts import calibration_text, tokens_fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A command, and what it leaves open: sentences on what to put in the place of its capitals."""

    command: str
    open: tuple[str, ...]


def reproduction(reader: Reader) -> Reproduction | None:
    """How to quantize again what an artifact holds; `None` where the manifest names no recipe or source."""
    manifest = reader.manifest
    provenance = manifest.provenance
    if manifest.recipe is None or "source" not in provenance:
        return None
    left: list[str] = []
    model = _demo_model(provenance["source"])
    if model is None:
        left.append(f"MODEL is the checkpoint with fingerprint {provenance['source']}.")
    words = ["quikjax", "quantize", model or "MODEL", "--out", "DIR"]
    named = RECIPES.get(str(manifest.recipe.get("name")))
    if named is not None and named.model_dump(mode="json") == manifest.recipe:
        words += ["--recipe", named.name]
    else:
        words += ["--recipe", "RECIPE.json"]
        left.append("RECIPE.json holds the recipe as it stands in this page's JSON.")
    tokens = provenance.get("tokens")
    if tokens is not None:
        samples, length = tokens["shape"]
        text = _text(reader, tokens)
        if text is None:
            left.append(f"TEXT is one whose first {samples} x {length} tokens have SHA-256 {tokens['sha256']}.")
        words += ["--calibration", text or "TEXT", "--samples", str(samples), "--seqlen", str(length)]
    words += ["--dtype", str(provenance.get("dtype", manifest.dtype))]
    return Reproduction(command=shlex.join(words), open=tuple(left))


def _demo_model(fingerprint: Any) -> str | None:
    """The name of the installed demo model with this fingerprint."""
    for name in DEMO_MODELS:
        try:
            if open_source(name).fingerprint() == fingerprint:
                return name
        except QuikError:
            continue  # it is not installed
    return None


def _text(reader: Reader, tokens: dict[str, Any]) -> str | None:
    """The name of the text that ships with Python, if its tokens are those that were calibrated on."""
    tokenizer = reader.tokenizer()
    if tokenizer is None:
        return None
    samples, length = tokens["shape"]
    model = abstract_model(reader.manifest.config or {})
    try:
        found = calibration_tokens(model, tokenizer, calibration_text("pydoc").content, samples, length)
    except QuikError:
        return None  # it is too short
    return "pydoc" if tokens_fingerprint(found) == tokens["sha256"] else None
