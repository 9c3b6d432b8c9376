"""Checkpoints by hub name, through `huggingface_hub`: its cache, its offline variables, its progress on stderr."""

import re
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Everything beside the weights, and the weights in the two formats that are read; pickles are never fetched.
_SMALL = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors"]
# What an artifact of ours is made of (`quikjax.checkpoint`), folders included; anything else in its repository stays there.
_MANIFEST = "quikjax.json"
_ARTIFACT = [_MANIFEST, "generation_config.json", "report.jsonl", "log.jsonl", "arrays/*", "tokenizer/*"]
_FLAX = ["flax_model.msgpack", "flax_model-*-of-*.msgpack"]


def is_hub_name(text: str) -> bool:
    """Tell whether `text` has the form "org/name" or "org/name@revision".

    >>> is_hub_name("facebook/opt-125m@main"), is_hub_name("./opt-125m"), is_hub_name("a/b/c")
    (True, False, False)
    """
    return _NAME.fullmatch(text) is not None


def fetch(name: str, *, weights: bool = True) -> tuple[Path, str]:
    """The directory in the hub's cache that holds "org/name[@revision]", downloaded if need be, and "org/name@commit".

    A repository that holds an artifact of ours is fetched as one. Without `weights` only what stands beside them is fetched:
    configuration, index, tokenizer.

    Raises:
        QuikError: no such repository or revision, no access, the hub cannot be reached and the cache lacks it, or the repository
            publishes no weights in a format that is read.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise QuikError(f'"{name}" is not a hub name, which has the form org/name or org/name@revision')
    repository, revision = parts["repository"], parts["revision"] or "main"
    if not weights:
        directory = _snapshot(repository, revision, _SMALL)
        return directory, f"{repository}@{directory.name}"
    # Small files first: they tell what else is to be fetched. Then the same commit, should the branch have moved meanwhile.
    directory = _snapshot(repository, revision, _SMALL)
    commit = directory.name
    if (directory / _MANIFEST).is_file():
        return _snapshot(repository, commit, _ARTIFACT, folders=True), f"{repository}@{commit}"
    directory = _snapshot(repository, commit, _SMALL + _SAFETENSORS)
    if not any(directory.glob("model*.safetensors")):
        directory = _snapshot(repository, commit, _SMALL + _FLAX)
        if not any(directory.glob("flax_model*.msgpack")):
            raise QuikError(
                f"{repository}@{commit} publishes neither safetensors nor Flax weights; convert it with transformers "
                "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)) and give the directory"
            )
    return directory, f"{repository}@{commit}"


def _snapshot(repository: str, revision: str, patterns: list[str], *, folders: bool = False) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        found: Any = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=None if folders else ["*/*"]
        )
        return Path(found)
    except errors.GatedRepoError:
        raise QuikError(f"access to {repository} must be granted on its hub page; then log in with: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise QuikError(
            f'neither this machine nor the hub has "{repository}"; check the spelling, or log in with: hf auth login'
        ) from None
    except errors.RevisionNotFoundError:
        raise QuikError(f'{repository} has no revision "{revision}" on the hub') from None
    except errors.IncompleteSnapshotError:
        raise QuikError(f"the hub cannot be reached and the cache holds only a part of {repository}@{revision}") from None
    except errors.LocalEntryNotFoundError:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise QuikError(
            f'"{repository}" is not here, the hub cannot be reached{offline}, and its cache does not hold revision "{revision}"'
        ) from None
    except Exception as problem:  # HTTP and network errors of whichever client huggingface_hub uses, a full disk
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise QuikError(f"{repository} could not be fetched from the hub: {reason[0]}") from None
