"""From a checkpoint's tensors to a model's parameter tree, checked against each other before the first tensor is read."""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quikjax.errors import QuikError
from quikjax.loading.names import HEAD, is_computed, quantized_with
from quikjax.loading.source import Source
from quikjax.models.base import Transformer
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.weights.host import adopt, empty, empty_parts

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte)\.weight$")

# Tensors read and converted beside each other. More would be faster where there are more cores; no plan counts their memory.
_AT_ONCE = 2


def match(source: Source, model: Transformer) -> dict[str, str]:
    """Match each parameter of `model` with the tensor of `source` that fills it: `{parameter: tensor}`, both by dotted name.

    Headers only. Tensors that a model computes by itself (rotary frequencies) are passed over, and so are a head beside tied
    embeddings, which `load_params` compares with them, and the heads of tasks that the model is not for.

    Raises:
        QuikError: tensors missing, tensors that nothing asks for, or shapes that differ (with both shapes).
    """
    wanted = dotted(pure_params(model))
    tensors = source.tensors()
    found: dict[str, str] = {}
    for path in wanted:
        candidates = [name for name in type(model).published_names(path) if name in tensors]
        if candidates:
            found[path] = candidates[0]
    missing = [path for path in wanted if path not in found]
    used = set(found.values())
    unexpected = [name for name in tensors if name not in used and not _harmless(name, wanted, type(model))]
    known = quantized_with(unexpected) if unexpected else None
    if known is not None:
        raise QuikError(f"{source.where} is already quantized ({known[0]}: it holds {known[1]}); give the original model")
    if missing:
        raise QuikError(f"{source.where} lacks {_listing(missing)} that its configuration asks for")
    if unexpected:
        raise QuikError(f"{source.where} holds {_listing(unexpected)} that its configuration has no place for")
    asked = {path: tuple(leaf.shape)[:: -1 if type(model).lies_transposed(path) else 1] for path, leaf in wanted.items()}
    wrong = [
        f"{name} is {list(tensors[name].shape)} where the configuration asks for {list(asked[path])}"
        for path, name in found.items()
        if tensors[name].shape != asked[path]
    ]
    strange = [name for name in found.values() if not jnp.issubdtype(tensors[name].dtype, jnp.floating)]
    if strange:
        stored = tensors[strange[0]].storage
        raise QuikError(
            f"{source.where}: tensor {strange[0]} is {stored} where floating numbers are expected; is it quantized already?"
        )
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise QuikError(f"{source.where}: tensor {wrong[0]}{more}")
    return found


def _harmless(name: str, wanted: Mapping[str, Any], family: type[Transformer]) -> bool:
    tied = name in family.repeated() or (name == HEAD and HEAD not in wanted)
    return tied or is_computed(name) or family.is_of_other_task(name)


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def load_params(
    source: Source, model: Transformer, names: Iterable[str] | None = None, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """The parameters of `model` from `source`, two tensors in memory at a time beside those already converted.

    Args:
        source: an opened checkpoint.
        model: the model that `source.config` describes; its parameters may be abstract, only their shapes are read.
        names: load only parameters at or below these published paths, such as `["model.layers.3"]` for one block;
            everything when None.
        dtype: floating dtype of all parameters.

    Returns:
        Nested dictionaries with the model's full paths, limited to `names`: for one block
        `load_params(source, model, ["model.layers.3"])["model"]["layers"]["3"]`.
        On a CPU what several blocks have alike lies in one memory, so that it is stacked without a copy; it is freed when the
        last of them is.

    Raises:
        QuikError: whatever `match` finds, before any tensor is read; a name of `names` that is no parameter's path; NaN or
            infinity in a tensor; values beyond the range of `dtype`.
    """
    found = match(source, model)
    if names is not None:
        found = _below(found, list(names))
    _check_tied(source, found, type(model))
    turned = type(model).lies_transposed
    places = _places(source, found, type(model), dtype) if jax.default_backend() == "cpu" else {}
    # NumPy lets go of Python's lock while it reads and converts.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        converted = pool.map(
            lambda path: _convert(source, found[path], dtype, transposed=turned(path), place=places.pop(path, None)), list(found)
        )
        return nested(dict(zip(found, converted, strict=True)))


def _places(source: Source, found: Mapping[str, str], family: type[Transformer], dtype: Any) -> dict[str, np.ndarray]:
    """Memory for the parameters that several blocks have in one shape, those of neighbours one behind the other."""
    alike: dict[Any, list[str]] = {}
    for path, name in found.items():
        block = family.block_of(path)
        if block is not None:
            stack, _, _ = block.rpartition(".")
            alike.setdefault((stack, path.removeprefix(block), source.shape(name)), []).append(path)
    places: dict[str, np.ndarray] = {}
    for (_, _, shape), paths in alike.items():
        if len(paths) > 1:
            paths.sort(key=lambda path: int(str(family.block_of(path)).rpartition(".")[2]))
            turned = family.lies_transposed(paths[0])
            places |= zip(paths, empty_parts(len(paths), shape[::-1] if turned else shape, dtype), strict=True)
    return places


def verify(source: Source, model: Transformer) -> None:
    """Read every tensor once, one at a time, and keep none: what `load_params` would find, before hours of work begin.

    Raises:
        QuikError: whatever `match` and `Source.read` find.
    """
    found = match(source, model)
    _check_tied(source, found, type(model))
    for name in found.values():
        source.read(name)


def _check_tied(source: Source, found: Mapping[str, str], family: type[Transformer]) -> None:
    """A tensor published beside the parameter that it is tied to must equal it: one of the two would be dropped."""
    tied = {name: found[path] for name, path in family.repeated().items() if path in found}
    table = next((name for name in found.values() if _EMBEDDING.search(name)), None)
    if table is not None and HEAD not in found.values():
        tied[HEAD] = table
    for name, other in tied.items():
        if name not in source.tensors():
            continue
        if source.shape(name) != source.shape(other) or not np.array_equal(source.read(name), source.read(other)):
            raise QuikError(
                f"{source.where}: its configuration ties the head to the embeddings, but {name} and {other} differ; "
                'set "tie_word_embeddings" to false in its config.json'
            )


def _below(found: Mapping[str, str], names: list[str]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for prefix in names:
        below = {path: name for path, name in found.items() if path == prefix or path.startswith(f"{prefix}.")}
        if not below:
            raise QuikError(f'the model has no parameters at "{prefix}"')
        chosen |= below
    return chosen


def _convert(source: Source, name: str, dtype: Any, *, transposed: bool, place: np.ndarray | None = None) -> Float[Array, "..."]:
    """A tensor as a parameter; in the memory `place`, where one is given."""
    array = source.read(name)
    if transposed:
        array = array.T
    if place is None:
        if array.dtype == dtype:
            return adopt(np.ascontiguousarray(array))
        place = empty(array.shape, dtype)
    with np.errstate(over="ignore"):  # reported below, by name
        place[...] = array
    if jnp.finfo(dtype).max < jnp.finfo(array.dtype).max and not np.isfinite(place).all():
        raise QuikError(
            f"{source.where}: tensor {name} has values beyond the range of {jnp.dtype(dtype)}; use float32 or bfloat16"
        )
    return adopt(place)
