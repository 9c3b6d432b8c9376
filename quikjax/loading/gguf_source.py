"""GGUF files of the LLaMA architecture under Hugging Face's names, layout and configuration fields.

Invariant: a tensor read here equals the tensor that the file was converted from, but for its block format's rounding.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from quikjax.errors import QuikError
from quikjax.loading.gguf_blocks import dequantize
from quikjax.loading.gguf_config import generation_config, published_config
from quikjax.loading.gguf_header import GGUFTensor, read_header
from quikjax.loading.source import Source, TensorInfo
from quikjax.weights.host import empty

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Their content is in `config`: rotary factors are recognised there, or refused.
_IN_CONFIG = ("rope_freqs.weight",)
_PLAIN: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}


class GGUFSource(Source):
    """One GGUF file. Block formats are dequantized to float32 by the `gguf` package; F32, F16 are read as they are."""

    def __init__(self, path: Path) -> None:
        """Read the header of the file at `path`.

        Raises:
            QuikError: damaged, of another architecture, or with metadata whose mathematics is not supported.
        """
        self.where = str(path)
        self.files = (path,)
        header = read_header(path)
        self.metadata = header.metadata
        self._stored: dict[str, tuple[str, GGUFTensor]] = {}
        for name, tensor in header.tensors.items():
            if name not in _IN_CONFIG:
                self._stored[published_name(name)] = (name, tensor)
        factors = header.tensors.get("rope_freqs.weight")
        self.config = published_config(
            self.where, header.metadata, header.tensors, None if factors is None else self._read_stored(factors)
        )
        self._tensors = {
            name: TensorInfo(tensor.shape, _PLAIN.get(tensor.kind, np.dtype(np.float32)), _storage(tensor.kind), tensor.size)
            for name, (_, tensor) in self._stored.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def tokenizer(self, *, plain: bool = False) -> Any | None:
        from quikjax.loading.gguf_tokenizer import rebuild_tokenizer

        for key in ("tokens", "merges"):
            for number, text in enumerate(self.metadata.get(f"tokenizer.ggml.{key}", ())):
                try:
                    text.encode()
                except UnicodeEncodeError:  # a byte that is not UTF-8 was read as half of a surrogate pair
                    raise QuikError(f"{self.where}: number {number} of tokenizer.ggml.{key} is not UTF-8 text") from None
        return rebuild_tokenizer(self.where, self.metadata, plain=plain)

    def generation_config(self) -> dict[str, Any] | None:
        return generation_config(self.metadata)

    def _read(self, name: str) -> np.ndarray:
        own_name, tensor = self._stored[name]
        array = self._read_stored(tensor)
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", own_name):
            heads = self.config["num_attention_heads" if ".attn_q." in own_name else "num_key_value_heads"]
            array = halves_from_pairs(array, heads)
        return array

    def _read_stored(self, tensor: GGUFTensor) -> np.ndarray:
        plain = _PLAIN.get(tensor.kind)
        stored = np.dtype(np.uint8) if plain is None else plain.newbyteorder("<")
        raw = np.fromfile(self.files[0], dtype=stored, count=tensor.size // stored.itemsize, offset=tensor.offset)
        if raw.nbytes != tensor.size:
            raise OSError("the file became shorter while it was being read")
        if plain is not None:
            return raw.reshape(tensor.shape)
        try:
            with np.errstate(all="ignore"):  # a scale that is not finite is reported by `read`, with the tensor's name
                return dequantize(raw, tensor.kind, tensor.shape)
        except NotImplementedError:
            raise QuikError(
                f"{self.where}: the block format {tensor.kind} cannot be read; convert the file to F16 or Q8_0"
            ) from None


def _storage(kind: str) -> str:
    plain = _PLAIN.get(kind)
    return kind if plain is None else plain.name


def published_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor of the LLaMA architecture; a name not known stays as it is.

    >>> published_name("blk.3.ffn_down.weight")
    'model.layers.3.mlp.down_proj.weight'
    >>> published_name("output_norm.weight")
    'model.norm.weight'
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{leaf}"
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if inside and inside[2] in _IN_BLOCK:
        return f"model.layers.{inside[1]}.{_IN_BLOCK[inside[2]]}.{leaf}"
    return name


def halves_from_pairs(array: Shaped[np.ndarray, "rows ..."], heads: int) -> Shaped[np.ndarray, "rows ..."]:
    """Reorder the rows of a query or key projection from GGUF's rotary layout to Hugging Face's.

    GGUF rotates neighbouring rows `(2i, 2i + 1)` of a head, Hugging Face rows `(i, i + size/2)`; a file's converter moved them.

    >>> halves_from_pairs(np.arange(8), heads=2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    out = empty(array.shape, array.dtype)
    out.reshape(heads, 2, -1, *array.shape[1:])[...] = np.moveaxis(pairs, 2, 1)
    return out
