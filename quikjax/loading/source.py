"""A published checkpoint of any format: names, shapes and configuration first, then one tensor at a time."""

import abc
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from quikjax.errors import QuikError
from quikjax.models.stops import named_stops, union_of_stops

GENERATION_CONFIG = "generation_config.json"

# Finiteness is checked in pieces of this many elements, so that the check needs no memory to speak of beside the tensor.
_CHECKED_AT_ONCE = 1 << 22


class TensorInfo(NamedTuple):
    """One tensor as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # what `read` returns
    storage: str  # how the file stores it: "float32", "bfloat16", "Q4_1"
    stored_bytes: int


class Source(abc.ABC):
    """A published checkpoint opened for reading. Opening reads headers only; `read` holds one tensor and nothing else.

    Invariant: `names()` are the names of the Hugging Face PyTorch checkpoint of the same model, weights lie as they do there
    (`[outputs, inputs]`; GPT-2's `[inputs, outputs]`), and `config` is what that checkpoint's `config.json` would say, whatever
    the format of the files.
    """

    where: str  # how messages call this checkpoint
    config: dict[str, Any]
    files: tuple[Path, ...]  # the files that hold weights
    revision: str | None = None  # "org/name@commit" where the hub gave it

    @abc.abstractmethod
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its published name."""

    @abc.abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """The tensor `name`, of the shape and dtype that `tensors` promises."""

    @abc.abstractmethod
    def tokenizer(self, *, plain: bool = False) -> Any | None:
        """The checkpoint's tokenizer (a `transformers` fast tokenizer), or None where it has none.

        With `plain`, a `PlainTokenizer` where it gives the same tokens and texts.

        Raises:
            QuikError: there is one, and it cannot be rebuilt exactly.
        """

    def tokenizer_files(self) -> tuple[Path, ...]:
        """The files that the tokenizer was published as, to be copied as they are; none where it has to be rebuilt."""
        return ()

    def generation_config(self) -> dict[str, Any] | None:
        """The content of this checkpoint's `generation_config.json`, or None where it has none.

        Raises:
            QuikError: the file is damaged.
        """
        return None

    def stops(self, tokenizer: Any | None) -> tuple[int, ...]:
        """Ids of the tokens that end a text: what the configuration, the generation's configuration and the tokenizer name.

        Raises:
            QuikError: one of the files names something that is no token.
        """
        return stops_of(self.config, self.generation_config(), tokenizer, self.where)

    def names(self) -> tuple[str, ...]:
        """Every tensor's published name, in the file's order."""
        return tuple(self.tensors())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`, from the header."""
        return self.tensors()[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that `read(name)` returns: the stored one, or float32 where the file stores blocks of codes."""
        return self.tensors()[name].dtype

    def storage(self, name: str) -> str:
        """Return the storage format of `name` in the file: a dtype's name, or a block format such as "Q4_1"."""
        return self.tensors()[name].storage

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in memory of its own.

        Raises:
            QuikError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        try:
            array = self._read(name)
        except OSError as problem:
            raise QuikError(f"{self.where}: tensor {name} cannot be read ({problem})") from None
        bad = _count_non_finite(array)
        if bad:
            raise QuikError(f"{self.where}: tensor {name} holds {bad} values that are NaN or infinite; the file is damaged")
        return array

    @property
    def size(self) -> int:
        """Bytes of the files that hold weights."""
        return sum(path.stat().st_size for path in self.files)

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in self._fingerprinted():
            digest.update(part)
        return digest.hexdigest()

    def _fingerprinted(self) -> Iterator[bytes]:
        facts = {"config": self.config, "revision": self.revision}
        yield json.dumps(facts, sort_keys=True, default=str).encode()
        for path in self.files:
            yield f"\n{path.name} {path.stat().st_size}\n".encode()
            with path.open("rb") as stream:
                yield hashlib.file_digest(stream, "sha256").digest()

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over the configuration, the revision and every byte of the weights, computed once.

        It does not depend on the folder that the files are in. Files are streamed, never held.
        """
        return self._fingerprint


def stops_of(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, tokenizer: Any | None, where: str
) -> tuple[int, ...]:
    """The union of the end tokens that a checkpoint's files name, each of which alone may be incomplete.

    Raises:
        QuikError: a file of the checkpoint called `where` names something that is no token.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    return union_of_stops(
        config.get("vocab_size", 1 << 31),
        named_stops(config, f"{where}: config.json"),
        named_stops(generation_config or {}, f"{where}: {GENERATION_CONFIG}"),
        [] if end is None else [end],
    )


def _count_non_finite(array: np.ndarray) -> int:
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        return 0
    flat = array.reshape(-1)
    return sum(
        int(np.count_nonzero(~np.isfinite(flat[at : at + _CHECKED_AT_ONCE]))) for at in range(0, flat.size, _CHECKED_AT_ONCE)
    )
