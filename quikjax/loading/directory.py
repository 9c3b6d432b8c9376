"""A directory as Hugging Face publishes it: `config.json`, tokenizer files, and weights as safetensors or Flax msgpack."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from quikjax.errors import QuikError
from quikjax.files import read_json, refuse_lfs_pointer
from quikjax.loading import names
from quikjax.loading.safetensors_header import TensorEntry, read_header
from quikjax.loading.source import GENERATION_CONFIG, Source, TensorInfo
from quikjax.loading.tokenizer import read_tokenizer, tokenizer_files
from quikjax.models.published import quantized_by

T = TypeVar("T")  # where a tensor lies, as each format knows it


class DirectorySource(Source, abc.ABC):
    """The parts of a Hugging Face directory that do not depend on the format of the weights."""

    def __init__(self, directory: Path, revision: str | None = None) -> None:
        """Read `config.json` of `directory`.

        Raises:
            QuikError: there is none, it is damaged, or it says that the weights are already quantized.
        """
        self.directory = directory
        self.revision = revision
        self.where = str(directory) if revision is None else revision
        if not (directory / "config.json").is_file():
            raise QuikError(f"{directory} has no config.json; it is not the directory of a published model")
        self.config = read_json(directory / "config.json")
        method = quantized_by(self.config)
        if method is not None:
            raise QuikError(f"{self.where} is already quantized ({method}); give the original model")

        if self.config.get("is_encoder_decoder", self.config.get("model_type") == "bart"):
            # How a text is begun and ended belongs to the model; newer checkpoints say it beside its configuration only.
            generation = self.generation_config() or {}
            names = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
            self.config |= {name: generation[name] for name in names if generation.get(name) is not None}

    def tokenizer(self, *, plain: bool = False) -> Any | None:
        for path in tokenizer_files(self.directory):
            refuse_lfs_pointer(path)
        return read_tokenizer(self.directory, self.config, plain=plain)

    def tokenizer_files(self) -> tuple[Path, ...]:
        return tokenizer_files(self.directory)

    def generation_config(self) -> dict[str, Any] | None:
        path = self.directory / GENERATION_CONFIG
        return read_json(path) if path.is_file() else None

    def believed(self, single: Path, index: Path) -> None:
        """Let messages say which file was read where a single one stands beside the index of another set."""
        if single.is_file() and index.is_file():
            self.where += f" (read from {single.name}, not from the shards of {index.name} beside it)"

    def assemble(
        self, held: Mapping[str, Mapping[str, T]], index: Path, expected: Mapping[str, list[str]], equal: Callable[[T, T], bool]
    ) -> dict[str, T]:
        """Every tensor by its published name, from what each file holds by the names that the file has.

        `expected` is what `read_index` made of `index`, empty where there is but one file; `equal` compares tensors' contents.

        Raises:
            QuikError: as `names.published` and `check_shards`.
        """
        every = [name for tensors in held.values() for name in tensors] + [name for some in expected.values() for name in some]
        plain = names.published(self.where, dict.fromkeys(every))
        renamed = {shard: {plain[name]: tensor for name, tensor in tensors.items()} for shard, tensors in held.items()}
        if expected:
            check_shards(index, {shard: [plain[name] for name in some] for shard, some in expected.items()}, renamed, equal)
        found: dict[str, T] = {}
        for tensors in renamed.values():
            # A tensor that is in two shards is the same in both: the first will do.
            found |= {name: tensor for name, tensor in tensors.items() if name not in found}
        return found


def read_index(path: Path) -> dict[str, list[str]]:
    """Which tensors an index file expects in which shard: `{shard: names}`, shards in order of name.

    Raises:
        QuikError: it is damaged, or names a shard that is not there.
    """
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(shard, str) for shard in entries.values()):
        raise QuikError(f'{path} has no usable "weight_map"; copy or download it again')
    # "./model-00001-of-00002.safetensors" is the same file, and so is what was written on Windows.
    entries = {name: PurePosixPath(shard.replace("\\", "/")).as_posix() for name, shard in entries.items()}
    shards: dict[str, list[str]] = {shard: [] for shard in sorted(set(entries.values()))}
    for name, shard in entries.items():
        shards[shard].append(name)
    outside = [shard for shard in shards if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts]
    if outside:
        raise QuikError(f"{path} names {outside[0]}, which is outside its directory; put the shards beside it")
    # A shard of nothing but what is computed may have been left out together with it.
    needed = [shard for shard, listed in shards.items() if not all(map(names.is_computed, listed))]
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if set(missing) & set(needed):
        raise QuikError(f"{path.parent} lacks {len(missing)} of {len(shards)} shards of the weights: {', '.join(missing[:3])}")
    return {shard: listed for shard, listed in shards.items() if shard not in missing}


def check_shards(
    path: Path, expected: Mapping[str, list[str]], held: Mapping[str, Mapping[str, T]], equal: Callable[[T, T], bool]
) -> None:
    """Compare an index file with what its shards hold. What is computed, and a head, may be in either alone.

    Raises:
        QuikError: a tensor is not in the shard that the index names (two shards swapped, or mixed with another model's), is in
            one that the index does not name, or differs between two.
    """
    really: dict[str, str] = {}
    for shard, tensors in held.items():
        for name, tensor in tensors.items():
            if name in really and not equal(held[really[name]][name], tensor):
                raise QuikError(
                    f"{path.parent}: {path.name} and its shards do not belong together: tensor {name} is in {really[name]} and, "
                    f"with other values, in {shard}"
                )
            really.setdefault(name, shard)
    for shard, listed in expected.items():
        for name in listed:
            if name in held[shard] or (name not in really and names.may_be_missing(name)):
                continue
            found = f"it is in {really[name]}: the shards are swapped" if name in really else "no shard has it"
            raise QuikError(f"{path.parent}: tensor {name} is not in {shard}, where {path.name} has it ({found})")
    known = {name for listed in expected.values() for name in listed}
    extra = [name for name in really if name not in known and not names.may_be_missing(name)]
    if extra:
        raise QuikError(f"{path.parent}: {path.name} and its shards do not belong together (tensor {extra[0]})")


class SafetensorsSource(DirectorySource):
    """`model.safetensors`, or shards with `model.safetensors.index.json`."""

    def __init__(self, directory: Path, revision: str | None = None) -> None:
        """Read the configuration, the index and the header of every shard, and compare them.

        Raises:
            QuikError: any of them is missing, damaged, truncated, or contradicts another.
        """
        super().__init__(directory, revision)
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        expected: dict[str, list[str]] = {}
        if single.is_file():
            self.believed(single, index)
        elif index.is_file():
            expected = read_index(index)
        elif single.is_symlink():
            raise QuikError(f"{single} is a link to a file that is gone; download the model again")
        else:
            raise QuikError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
        self.files = tuple(directory / shard for shard in expected) or (single,)
        held = {
            path.relative_to(directory).as_posix(): {name: (path, entry) for name, entry in read_header(path).items()}
            for path in self.files
        }
        self._entries = self.assemble(held, index, expected, _equal)
        self._tensors = {
            name: TensorInfo(entry.shape, entry.dtype, entry.dtype.name, entry.size) for name, (_, entry) in self._entries.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str) -> np.ndarray:
        return _read(*self._entries[name])


def _read(path: Path, entry: TensorEntry) -> np.ndarray:
    array = np.fromfile(path, dtype=entry.dtype.newbyteorder("<"), count=entry.size // entry.dtype.itemsize, offset=entry.offset)
    if array.nbytes != entry.size:
        raise OSError("the file became shorter while it was being read")
    return array.reshape(entry.shape)


def _equal(one: tuple[Path, TensorEntry], other: tuple[Path, TensorEntry]) -> bool:
    alike = (one[1].shape, one[1].dtype) == (other[1].shape, other[1].dtype)
    return alike and _read(*one).tobytes() == _read(*other).tobytes()
