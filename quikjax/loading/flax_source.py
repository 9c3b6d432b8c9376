"""Flax checkpoints of OPT, GPT-2, BART and the encoders (`flax_model.msgpack`) with the names and the layout of PyTorch's.

Flax keeps a dense `kernel` as `[inputs, outputs]`, an embedding as `embedding` and a norm's factor as `scale`; PyTorch calls all
three `weight` and keeps the dense one as `[outputs, inputs]`. With GPT-2's layers it is the other way round in both: there, too,
a `kernel` is the `weight` turned.
"""

from pathlib import Path

import numpy as np

from quikjax.errors import QuikError
from quikjax.loading.directory import DirectorySource, read_index
from quikjax.loading.msgpack_header import Array, read_layout
from quikjax.loading.source import TensorInfo

_SINGLE, _INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
_FAMILIES = ("opt", "gpt2", "bart", "bert", "roberta", "xlm-roberta", "distilbert")
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class FlaxSource(DirectorySource):
    """`flax_model.msgpack`, or shards with `flax_model.msgpack.index.json`."""

    def __init__(self, directory: Path, revision: str | None = None) -> None:
        """Read the configuration and walk the layout of every file.

        Raises:
            QuikError: any of them is missing, damaged or truncated, or the model is of another family.
        """
        super().__init__(directory, revision)
        kind = self.config.get("model_type")
        if kind not in _FAMILIES:
            # Other families' Flax classes named and laid out their parameters each in its own way.
            raise QuikError(
                f'{self.where}: Flax weights of a "{kind}" model are not supported, only of {", ".join(_FAMILIES)}; '
                "use safetensors"
            )
        single, index = directory / _SINGLE, directory / _INDEX
        expected: dict[str, list[str]] = {}
        if single.is_file():
            self.believed(single, index)
        else:
            listed = read_index(index)
            expected = {shard: [published_name(name.replace("/", "."))[0] for name in some] for shard, some in listed.items()}
        self.files = tuple(directory / shard for shard in expected) or (single,)
        held = {path.relative_to(directory).as_posix(): _layout(path) for path in self.files}
        self._arrays = self.assemble(held, index, expected, _equal)
        self._tensors = {
            name: TensorInfo(
                array.shape[::-1] if transposed else array.shape,
                array.dtype,
                array.dtype.name,
                sum(piece.size for piece in array.pieces),
            )
            for name, (_, array, transposed) in self._arrays.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str) -> np.ndarray:
        return _read(*self._arrays[name])


def _read(path: Path, array: Array, transposed: bool) -> np.ndarray:
    flat = np.empty(sum(piece.size for piece in array.pieces), np.uint8)
    room, at = flat.data, 0
    with path.open("rb") as stream:
        for piece in array.pieces:
            stream.seek(piece.offset)
            if stream.readinto(room[at : at + piece.size]) != piece.size:
                raise OSError("the file became shorter while it was being read")
            at += piece.size
    tensor = flat.view(array.dtype).reshape(array.shape)
    return np.ascontiguousarray(tensor.T) if transposed else tensor


def _layout(file: Path) -> dict[str, tuple[Path, Array, bool]]:
    """Every array of a file by its PyTorch name: the file, the array, and whether its axes change places."""
    arrays = {published_name(path): array for path, array in read_layout(file).items()}
    return {name: (file, array, transposed and len(array.shape) == 2) for (name, transposed), array in arrays.items()}


def _equal(one: tuple[Path, Array, bool], other: tuple[Path, Array, bool]) -> bool:
    alike = (one[1].shape, one[1].dtype) == (other[1].shape, other[1].dtype)
    return alike and _read(*one).tobytes() == _read(*other).tobytes()


def published_name(path: str) -> tuple[str, bool]:
    """PyTorch's name of a Flax parameter, and whether its two axes change places. A leaf not known stays as it is.

    >>> published_name("model.decoder.layers.0.fc1.kernel")
    ('model.decoder.layers.0.fc1.weight', True)
    >>> published_name("model.decoder.embed_tokens.embedding")
    ('model.decoder.embed_tokens.weight', False)
    """
    stem, dot, leaf = path.rpartition(".")
    return f"{stem}{dot}{_LEAVES.get(leaf, leaf)}", leaf == "kernel"
