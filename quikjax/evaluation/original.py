"""Is a model the one that an artifact was made from? Figures against anything else mean something else."""

from pathlib import Path
from typing import Any

import numpy as np

from quikjax.checkpoint import read_manifest
from quikjax.errors import QuikError
from quikjax.loading import open_source, resolve
from quikjax.loading.formats import ARTIFACT_FILE
from quikjax.texts import tokenize

# Enough text for two tokenizers to differ in, if they differ.
_COMPARED = 20_000


def is_artifact(model: str | Path) -> bool:
    """Whether `model` names an artifact of ours, not a published checkpoint.

    Raises:
        QuikError: nothing has that name.
    """
    return (resolve(model, weights=False).path / ARTIFACT_FILE).is_file()


def check_original(model: str | Path, against: str | Path, *, allow_other: bool = False) -> str | None:
    """Compare the fingerprint of the source that the artifact `model` was made from with that of `against`.

    `against` may be another artifact made from the same source. Where `model` is no artifact there is nothing to compare.

    Returns:
        with `allow_other`, one sentence on how the two differ; `None` if they belong together.

    Raises:
        QuikError: they do not belong together, or `model` does not say what it was made from, and `allow_other` is not set.
    """
    if not is_artifact(model):
        return None
    made_from = read_manifest(model).provenance.get("source")
    if is_artifact(against):
        found = read_manifest(against).provenance.get("source")
        what = f"{against} was made from"
    else:
        found = open_source(against).fingerprint()
        what = f"{against} is"
    if made_from is not None and made_from == found:
        return None
    if made_from is None:
        problem = f"{model} does not say which model it was made from"
    else:
        problem = f"{model} was made from a model with fingerprint {str(made_from)[:16]}, and {what} {str(found)[:16]}"
    if allow_other:
        return problem
    raise QuikError(f"{problem}; compare it with its own original, or allow any with --any-original")


def check_tokenizers(mine: Any, other: Any, text: str, model: str | Path, against: str | Path) -> None:
    """See that two models read the beginning of a text as the same tokens. A model without a tokenizer of its own is not asked.

    Raises:
        QuikError: they do not.
    """
    if other is None:
        return
    part = text[:_COMPARED]
    if not np.array_equal(tokenize(mine, part), tokenize(other, part)):
        raise QuikError(f"{against} reads this text as other tokens than {model}; the two cannot be compared token by token")
