"""Find the format of a checkpoint on disk and open the source that reads it."""

from pathlib import Path

from quikjax.errors import QuikError
from quikjax.loading.directory import SafetensorsSource
from quikjax.loading.flax_source import FlaxSource
from quikjax.loading.gguf_source import GGUFSource
from quikjax.loading.resolve import Found, resolve
from quikjax.loading.source import Source

# What quikjax.checkpoint writes into each artifact of its own.
ARTIFACT_FILE = "quikjax.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_source(model: str | Path) -> Source:
    """Open a published checkpoint: configuration and headers are read and checked, no tensor is.

    Args:
        model: "smollm2-135m", a directory (safetensors, Flax msgpack, or one GGUF file in it), a `.gguf` file, or a hub name
            "org/name" or "org/name@revision".

    Raises:
        QuikError: nothing has this name, its format is not read, or its files are damaged.
    """
    return open_found(resolve(model))


def open_found(found: Found) -> Source:
    """`open_source` behind `resolve`."""
    path = found.path
    if path.is_dir():
        return _open_directory(path, found.revision)
    if path.suffix == ".gguf":
        return GGUFSource(path)
    if path.suffix in (".safetensors", ".msgpack"):
        raise QuikError(f"{path} holds weights without their configuration; give the directory that it is in")
    raise QuikError(f"{path} is not a model: a directory, a .gguf file or a hub name is expected")


def _open_directory(path: Path, revision: str | None) -> Source:
    if (path / ARTIFACT_FILE).is_file():
        raise QuikError(f"{path} is an artifact of quikjax, not a published checkpoint; restore it instead")
    if any(path.glob("model*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return SafetensorsSource(path, revision)
    if any(path.glob("flax_model*.msgpack")):
        return FlaxSource(path, revision)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GGUFSource(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:4]) + (", ..." if len(ggufs) > 4 else "")
        raise QuikError(f"{path} holds {len(ggufs)} GGUF files; give the path of one ({names})")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise QuikError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when opened and are not loaded; convert them, "
            "where PyTorch is installed, with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    if not any(path.iterdir()):
        raise QuikError(f"{path} is empty")
    raise QuikError(f"{path} holds no model: neither model.safetensors, flax_model.msgpack nor a .gguf file is in it")
