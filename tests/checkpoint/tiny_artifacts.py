"""Tiny random models, dense and packed by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_model
from quikjax.quantizing.codebook import abstract_codebook
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.quik import QuikWeight

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
SMALL = CONFIG | {"num_hidden_layers": 1}


def pack(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    *,
    bits: int = 4,
    outliers: int = 2,
    dtype: Any = jnp.float16,
    group: str | None = None,
    level_clip: tuple[int, int] | None = None,
) -> QuikWeight:
    """A valid packed `[N, K]` weight of random numbers. NumPy converts, so that nothing is compiled."""
    n, k = shape
    base = k - outliers
    scale = rng.uniform(0.01, 0.1, n).astype(np.float32)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, base))
    return QuikWeight(
        qweight=jnp.asarray(codes.astype(jnp.int4 if bits == 4 else np.int8)),
        scale=jnp.asarray(scale),
        reduced=jnp.asarray((scale.astype(np.float64) * codes.sum(axis=1)).astype(np.float32)),
        outliers=jnp.asarray(rng.normal(size=(n, outliers)).astype(dtype)),
        columns=jnp.asarray(rng.permutation(k).astype(np.int32)),
        weight_bits=bits,
        activation_bits=bits,
        shape=shape,
        in_axes=(1,),
        base=base,
        group=group,
        level_clip=level_clip,
    )


def pack_codebook(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    *,
    data_type: Any = "nf",
    bits: int = 3,
    block: int = 48,
    outliers: int = 2,
    absmax: Any = "float16",
    centered: bool = False,
    group: str | None = None,
) -> CodebookWeight:
    """A valid codebook weight `[N, K]` of random codes. Its data type must have all `2^bits` of them."""
    rule = CodebookRule(match="", data_type=data_type, bits=bits, block=block, absmax=absmax, centered=centered)
    empty = abstract_codebook(rule, shape, (1,), shape[1] - outliers, group)
    data: dict[str, Any] = {}
    for field, (extent, dtypes) in empty.layout().items():
        if dtypes[0] == "uint8":
            data[field] = rng.integers(0, 256, extent).astype(np.uint8)
        else:
            data[field] = rng.uniform(0.01, 1, extent).astype(jnp.dtype(dtypes[0]))
    data["codebook"] = np.sort(data["codebook"])
    data["columns"] = np.sort(rng.choice(shape[1], outliers, replace=False)).astype(np.int32)
    fields: Any = {field: jnp.asarray(array) for field, array in data.items()}
    return dataclasses.replace(empty, **fields)


def random_params(
    seed: int = 0, *, packed: bool = True, dtype: Any = jnp.float32, config: dict[str, Any] = CONFIG
) -> dict[str, Any]:
    """Parameters of the tiny model by full name; with `packed`, its linear layers in QUIK format, down_proj in 8 bits and
    k_proj with a level clip; o_proj and gate_proj are in codebooks."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for path, leaf in dotted(pure_params(abstract_model(config, dtype))).items():
        if packed and "o_proj" in path:
            params[path] = pack_codebook(rng, leaf.shape)
        elif packed and "gate_proj" in path:
            params[path] = pack_codebook(
                rng, leaf.shape, data_type="quantile", bits=5, outliers=0, absmax="double", centered=True
            )
        elif packed and "proj" in path:
            clip = (17, 1) if "k_proj" in path else None
            params[path] = pack(rng, leaf.shape, bits=8 if "down_proj" in path else 4, level_clip=clip)
        else:
            params[path] = jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype))
    return params


def build(params: dict[str, Any], config: dict[str, Any] = CONFIG) -> CausalLM:
    """The model of `config` with these parameters."""
    return checked_model(nnx.merge(nnx.split(abstract_model(config))[0], nested(params)))


def assert_same_bits(left: Any, right: Any) -> None:
    """Two trees have the same structure, static fields included, and the same dtypes, shapes and bits."""
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        wide = (np.asarray(array).astype(np.int8) if array.dtype == jnp.int4 else np.asarray(array) for array in (one, other))
        assert next(wide).tobytes() == next(wide).tobytes()


def tiny_tokenizer() -> Any:
    """A tokenizer of two words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def read_directory(directory: Path) -> dict[str, bytes]:
    """Every file below a directory: its relative path and its bytes."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
