"""From what a person types as ARTIFACT to its directory on this machine. Without JAX, so that a mistake costs no time."""

import difflib
import os
from pathlib import Path

from quikjax.checkpoint import atomic
from quikjax.checkpoint.manifest import MANIFEST
from quikjax.checkpoint.output import real_path
from quikjax.errors import QuikError, did_you_mean
from quikjax.files import user_path
from quikjax.loading.hub import fetch, is_hub_name


def locate(path: str | os.PathLike[str]) -> Path:
    """The directory of an artifact that is named by a path or, where no such path exists, by its hub name "org/name[@revision]".

    Raises:
        QuikError: it is a hub name, and the hub and its cache do not have it.
    """
    given, text = user_path(path), str(path)
    absent = is_hub_name(text) and not os.path.lexists(given)
    # A name that is nearly that of an artifact here is a typing error, not a repository.
    if absent and not _artifacts_beside(real_path(text), like=True):
        return fetch(text)[0]
    return real_path(path)


def refuse_foreign(directory: Path) -> None:
    """Raise `QuikError` unless `directory` is that of an artifact, by its manifest's name alone."""
    if not os.path.lexists(directory):
        beside = _artifacts_beside(directory)
        hint = f"; {did_you_mean(directory.name, beside)}" if beside else ""
        raise QuikError(f"there is no directory {directory}{hint}")
    if not directory.is_dir():
        raise QuikError(f"{directory} is a file, not the directory of an artifact")
    with atomic.disk_errors(f"cannot read {directory}"):
        entries = os.listdir(directory)
    if MANIFEST not in entries:
        hint = " but of a published checkpoint: quantize it first" if "config.json" in entries else ""
        raise QuikError(f"{directory} has no {MANIFEST}: it is not the directory of an artifact{hint}")


def _artifacts_beside(directory: Path, *, like: bool = False) -> list[str]:
    """Names of artifacts in the same place, and what a killed replacement may have left; with `like`, those spelled alike."""
    if not directory.parent.is_dir() or not os.access(directory.parent, os.R_OK | os.X_OK):
        return []
    names = sorted(entry.name for entry in directory.parent.iterdir() if (entry / MANIFEST).is_file())
    return difflib.get_close_matches(directory.name, names, cutoff=0.75) if like else names
