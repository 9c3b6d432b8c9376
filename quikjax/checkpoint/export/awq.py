"""Export of 4-bit weights in groups as AWQ checkpoints hold them, as vLLM, SGLang, transformers (with gptqmodel) and others read.

What AutoAWQ calls `gemm`, for a layer of `N` outputs and `K` inputs in groups of `g`, in the place of its `weight`:

    qweight   int32 [K, N/8]       the codes of eight outputs in a word
    qzeros    int32 [K/g, N/8]     the zero points, alike
    scales    float16 [K/g, N]

Four bits at `4 j` of a word are those of its output `ORDER[j]`, and

    W[n, k] = scales[k // g, n] (code(n, k) - zero(n, k // g))

These are the numbers of `GroupWeight`, whatever algorithm found them; no bit of them changes. Everything else stays in floats,
as do activations, also where the artifact's are rounded. Symmetric groups have the zero point 8.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32, UInt8

from quikjax.algorithms import codebooks
from quikjax.checkpoint import Reader
from quikjax.checkpoint.export.dequantized import checked_dtype, dense
from quikjax.checkpoint.export.directory import SHARD_BYTES, Exported, Form, Progress, Tensor, export_directory, in_order
from quikjax.checkpoint.manifest import Part
from quikjax.checkpoint.parts import rebuild
from quikjax.errors import QuikError
from quikjax.models.base import CausalLM, Linear, Transformer
from quikjax.models.registry import abstract_model
from quikjax.weights.groups import GroupWeight

# Outputs of a word from its lowest bits upwards.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS, _IN_A_WORD = 4, 8
_INSTEAD = (
    "export it with safetensors-dequantized, or quantize with --recipe gptq-w4a16-g128 and a --block that divides all inputs"
)


def export_awq(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write an artifact as the Hugging Face directory `out` with packed 4-bit weights (`directory.export_directory`).

    Args:
        dtype: of what is in floats, but for scales, which are float16. Left out, float16, in which AWQ's kernels compute.

    Raises:
        QuikError: as `export_directory`; the model generates no text, or its layers are no plain ones; a quantized layer is in
            another format than 4 bits in groups that divide it, in the order of its inputs, or two differ in the group; a value
            is beyond the range of `dtype`.
    """

    def form(reader: Reader, family: type[Transformer]) -> Form:
        if not issubclass(family, CausalLM):
            raise QuikError(f"{reader.path} is a {family.__name__}; AWQ checkpoints are of models that continue texts")
        floats = checked_dtype(dtype or "float16")
        weights = {path: weight for part in reader.parts.values() for path, weight in _packed(part).items()}
        config = _quantization_config(reader, family, weights)
        tensors = {}
        for name, part in in_order(reader.parts).items():
            here: dict[str, Tensor] = {}
            for path, row in part.arrays.items():
                if path.rpartition(".")[0] not in part.packed:
                    here[family.published_names(path)[0]] = Tensor(row.shape, floats)
            for path in part.packed:
                here |= {_beside(family, path, field): tensor for field, tensor in _tensors(weights[path]).items()}
            tensors[name] = here

        def arrays(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
            for path, leaf in params.items():
                if isinstance(leaf, GroupWeight):
                    for field, array in awq_tensors(leaf).items():
                        yield _beside(family, path, field), array
                else:
                    yield family.published_names(path)[0], dense(family, path, leaf, floats)

        return Form(dtype=floats, tensors=tensors, arrays=arrays, config={"quantization_config": config})

    return export_directory(artifact, out, form, shard_bytes=shard_bytes, progress=progress)


def awq_tensors(weight: GroupWeight) -> dict[str, np.ndarray]:
    """`qweight`, `qzeros` and `scales` of a 4-bit weight in groups that divide it, on the host."""
    n, k = weight.outputs, weight.inputs
    codes = np.asarray(codebooks.unpack(jnp.asarray(weight.codes), n * k)).reshape(n, k)
    scale = np.asarray(weight.scale)
    zero = np.full(scale.shape, 2 ** (_BITS - 1), np.uint8) if weight.symmetric else np.asarray(weight.zero)
    return {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": np.ascontiguousarray(scale.T)}


def words(codes: UInt8[np.ndarray, "rows n"]) -> Int32[np.ndarray, "rows words"]:
    """Codes of four bits, eight side by side in a word, in AWQ's order."""
    eight = codes.reshape(codes.shape[0], -1, _IN_A_WORD)[..., ORDER].astype(np.uint32)
    shifts = np.arange(0, 32, _BITS, dtype=np.uint32)
    return np.bitwise_or.reduce(eight << shifts, axis=-1).view(np.int32)


def problem_of(family: type[Transformer], path: str, weight: Any) -> str | None:
    """Say why a packed weight, which needs no arrays, has no place in the format, or return `None`."""
    if not isinstance(weight, GroupWeight):
        return f"is in the format {weight.label}"
    if weight.bits_per_code != _BITS:
        return f"has {weight.bits_per_code} bits"
    if weight.permuted:
        return "has groups of reordered columns"
    if family.lies_transposed(path):
        return "lies with its inputs first (Conv1D)"
    if weight.inputs % weight.group_size:
        return f"has {weight.inputs} inputs, no multiple of the group of {weight.group_size}"
    if weight.outputs % _IN_A_WORD:
        return f"has {weight.outputs} outputs, no multiple of {_IN_A_WORD}"
    return None


def _packed(part: Part) -> dict[str, Any]:
    """A part's packed weights without their arrays, by path."""
    found = {}
    for path, static in part.packed.items():
        rows = {name.rpartition(".")[2]: row for name, row in part.arrays.items() if name.rpartition(".")[0] == path}
        found[path] = rebuild(static, rows, path)
    return found


def _tensors(weight: GroupWeight) -> dict[str, Tensor]:
    n, k, groups = weight.outputs, weight.inputs, weight.inputs // weight.group_size
    return {
        "qweight": Tensor((k, n // _IN_A_WORD), "int32"),
        "qzeros": Tensor((groups, n // _IN_A_WORD), "int32"),
        "scales": Tensor((groups, n), "float16"),
    }


def _beside(family: type[Transformer], path: str, field: str) -> str:
    """The name of a layer's tensor: that of its weight with another last part."""
    return f"{family.published_names(path)[0].rpartition('.')[0]}.{field}"


def _quantization_config(reader: Reader, family: type[Transformer], weights: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `config.json`. Linear layers in floats are named, but for the head, which readers leave alone anyway."""
    if not weights:
        raise QuikError(f"{reader.path} has no quantized layers; export it with safetensors-dequantized")
    for path, weight in weights.items():
        if (problem := problem_of(family, path, weight)) is not None:
            raise QuikError(f"{path} {problem}, which AWQ's format does not have; {_INSTEAD}")
    sizes = {weight.group_size: path for path, weight in weights.items()}
    if len(sizes) > 1:
        raise QuikError(
            "AWQ's format has groups of one size, and these are of "
            + ", ".join(f"{size} ({path})" for size, path in sorted(sizes.items()))
            + f"; {_INSTEAD}"
        )
    model = abstract_model(reader.manifest.config or {})
    linear = {".".join(str(name) for name in path) for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    floats = sorted(linear - {path.rpartition(".")[0] for path in weights} - {"lm_head"})
    return {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": next(iter(sizes)),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": floats or None,
    }
