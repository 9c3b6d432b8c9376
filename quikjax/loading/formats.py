"""Find the format of a checkpoint on disk and open the source that reads it."""

import os
import re
from pathlib import Path

from quikjax.errors import QuikError
from quikjax.files import refuse_lfs_pointer
from quikjax.loading.directory import SafetensorsSource
from quikjax.loading.flax_source import FlaxSource
from quikjax.loading.gguf_header import is_gguf
from quikjax.loading.gguf_source import GGUFSource
from quikjax.loading.locate import Found, resolve
from quikjax.loading.source import Source

# What quikjax.checkpoint writes into each artifact of its own.
ARTIFACT_FILE = "quikjax.json"
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# How llama.cpp names the parts of a model that is split.
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def open_source(model: str | Path) -> Source:
    """Open a published checkpoint: configuration and headers are read and checked, no tensor is.

    Args:
        model: "smollm2-135m" or "all-minilm-l6-v2", a directory (safetensors, Flax msgpack, or one GGUF file in it), a `.gguf`
            file, or a hub name "org/name" or "org/name@revision".

    Raises:
        QuikError: nothing has this name, its format is not read, or its files are damaged.
    """
    return open_found(resolve(model))


def open_found(found: Found) -> Source:
    """`open_source` behind `resolve`."""
    path = found.path
    if path.is_dir():
        return _open_directory(path, found.revision)
    if path.suffix == ".gguf" or is_gguf(path):
        return GGUFSource(path)
    refuse_lfs_pointer(path)
    if path.suffix in (".safetensors", ".msgpack"):
        raise QuikError(f"{path} holds weights without their configuration; give the directory that it is in")
    if path.suffix == ".json":
        raise QuikError(f"{path} is a part of a model; give the directory that it is in")
    raise QuikError(f"{path} is not a model: a directory, a .gguf file or a hub name is expected")


def _open_directory(path: Path, revision: str | None) -> Source:
    if (path / ARTIFACT_FILE).is_file():
        # One without packed weights, such as a teacher that `train` made, is quantized by way of its export.
        raise QuikError(
            f"{path} is an artifact of quikjax, not a published checkpoint; restore it instead, or give the directory that "
            f"this writes: quikjax export {path} --format safetensors-dequantized --out DIR"
        )
    if any(os.path.lexists(path / name) for name in _SAFETENSORS) or any(path.glob("model-*-of-*.safetensors")):
        return SafetensorsSource(path, revision)
    if any(path.glob("flax_model*.msgpack")):
        return FlaxSource(path, revision)
    # Hidden files are other systems' notes about files (`._model.gguf`).
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    ggufs = [file for file in files if file.suffix == ".gguf"] or [file for file in files if is_gguf(file)]
    parts = [file for file in ggufs if _PART.search(file.name)]
    if parts and len(parts) == len(ggufs):
        raise QuikError(
            f"{path} holds a model in {len(parts)} GGUF parts ({parts[0].name}, ...); join them with: llama-gguf-split --merge"
        )
    if len(ggufs) == 1:
        return GGUFSource(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:4]) + (", ..." if len(ggufs) > 4 else "")
        raise QuikError(f"{path} holds {len(ggufs)} GGUF files; give the path of one ({names})")
    raise _nothing_in(path, files)


def _nothing_in(path: Path, files: list[Path]) -> QuikError:
    """Why a directory is no model, from what is in it."""
    if (path / "adapter_config.json").is_file():
        return QuikError(f"{path} is an adapter (adapter_config.json), not a model; merge it into its model first")
    others = [file.name for file in files if file.suffix == ".safetensors"]
    if others:
        return QuikError(f"{path} has neither model.safetensors nor its index, but {others[0]}; if that is the model, rename it")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return QuikError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when opened and are not loaded; convert them, "
            "where PyTorch is installed, with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    if not files:
        return QuikError(f"{path} is empty")
    return QuikError(f"{path} holds no model: neither model.safetensors, flax_model.msgpack nor a GGUF file is in it")
