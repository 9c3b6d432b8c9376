"""Save and restore a model as an artifact."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from quikjax.checkpoint.parts import REST
from quikjax.checkpoint.reader import Reader
from quikjax.checkpoint.shapes import check_parameters, shapes_of
from quikjax.checkpoint.writer import Writer, stored_shapes
from quikjax.errors import QuikError
from quikjax.loading.source import stops_of
from quikjax.models.base import Transformer
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.stops import named_stops
from quikjax.models.tokens import checked_transformer
from quikjax.weights.host import adopt


def split_parts(params: Mapping[str, Any], *block_paths: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Full parameter names, divided into parts: one per block below any of `block_paths`, and the rest.

    >>> split_parts({"layers.0.w": 1, "layers.1.w": 2, "norm": 3}, ("layers",))
    {'layers.0': {'layers.0.w': 1}, 'layers.1': {'layers.1.w': 2}, 'rest': {'norm': 3}}
    """
    divided: dict[str, dict[str, Any]] = {}
    for path, leaf in params.items():
        steps = tuple(path.split("."))
        depths = (len(where) for where in block_paths if steps[: len(where)] == where and len(steps) > len(where) + 1)
        depth = next(depths, None)
        divided.setdefault(REST if depth is None else ".".join(steps[: depth + 1]), {})[path] = leaf
    return divided


def save(
    path: str | os.PathLike[str],
    model: Transformer,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    recipe: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    report: Iterable[Mapping[str, Any]] | None = None,
    force: bool = False,
) -> str:
    """Save a model, dense or quantized, as the artifact `path`, and return its fingerprint.

    Args:
        path: a directory that does not exist or is empty, or with `force` an artifact, replaced once the new one is whole.
        model: one of ours, with its weights.
        config: its published configuration; needed only if the model was not built by `abstract_model`.
        tokenizer, report: see `Writer.finish`.
        generation_config: see `Writer.finish`; `model.stops` are added to the tokens that it says end a text.
        recipe, provenance: see `Writer`.

    Raises:
        QuikError: `path` exists, the parameters are not those of the configuration, a weight breaks its invariant, the disk is
            full or refuses. What was at `path` is untouched, and nothing else is left.
    """
    model = checked_transformer(model)
    if config is None and model.published is None:
        raise QuikError("the model does not know its published configuration; pass it as config")
    published = json.loads(model.published or "null") if config is None else config
    params = dotted(pure_params(model))
    with Writer(path, config=published, recipe=recipe, provenance=provenance, force=force) as writer:
        # First: a mismatch with the configuration would make an artifact that nobody can restore.
        writer.check_whole(shapes_of(model))
        for name, members in split_parts(params, *model.stacks()).items():
            writer.write_part(name, members)
        return writer.finish(tokenizer=tokenizer, generation_config=_with_stops(generation_config, model.stops), report=report)


def _with_stops(generation_config: Mapping[str, Any] | None, stops: tuple[int, ...]) -> dict[str, Any] | None:
    """The configuration with all of `stops` in it; as it was where it names them already."""
    fields = dict(generation_config or {})
    named = named_stops(fields, "generation_config")
    if set(stops) - set(named):
        ends = [*named, *(token for token in stops if token not in named)]
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return fields or None


def restore(
    path: str | os.PathLike[str], *, verify: bool = True, context: int | None = None, plain_tokenizer: bool = False
) -> tuple[Transformer, Any]:
    """The model and the tokenizer (or `None`) of an artifact. The bits of every weight are those that were saved.

    Args:
        path: the artifact's directory, or its hub name "org/name".
        verify: compare the SHA-256 of every file and every array with the manifest; without, names, sizes, dtypes and shapes.
        context: longest text in tokens, in place of what the configuration declares.
        plain_tokenizer: see `quikjax.load`.

    Raises:
        QuikError: there is no artifact, or something in it is not as it was saved, which is named. Nothing is handed out then.
    """
    reader = Reader(path, verify=verify)
    if reader.manifest.config is None:
        raise QuikError(f"{reader.path} holds parameters without a model configuration; read it with restore_params")
    abstract = abstract_model(reader.manifest.config, reader.manifest.dtype, context=context)
    held = {name: shape for part in reader.parts.values() for name, shape in stored_shapes(part).items()}
    check_parameters(shapes_of(abstract), held, whole=True)
    tokenizer = reader.tokenizer(plain=plain_tokenizer)
    abstract.stops = stops_of(reader.manifest.config, reader.generation_config(), tokenizer, str(reader.path))
    return nnx.merge(nnx.split(abstract)[0], _params(reader)), tokenizer


def restore_params(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """The parameters of an artifact as nested dictionaries, for a model of one's own.

    Raises:
        QuikError: as `restore`.
    """
    return _params(Reader(path, verify=verify))


def _params(reader: Reader) -> dict[str, Any]:
    """Every part, read, checked and put on JAX's default device."""
    flat: dict[str, Any] = {}
    for name in reader.parts:
        flat.update({path: jax.tree.map(adopt, leaf) for path, leaf in reader.read_part(name).items()})
    return nested(flat)
