"""Report on an artifact: what was quantized and how well, what was not and why, how large it is. No weight is read."""

import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from quikjax.checkpoint import REST, Reader, sizes
from quikjax.checkpoint.artifact_sizes import Sizes, dtype_bits
from quikjax.checkpoint.parts import rebuild
from quikjax.quantizing.recipe import Recipe
from quikjax.weights.sparse import EXPANDED

WORST = 5  # how many layers are named


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Quantized layers that are equal but for the number of their block, which is `*` in `pattern`. `format` is a word.

    `bytes` are those of all of them as stored. Errors are relative, `||y - y_hat|| / ||y||` of the layer's output: the root of
    the mean square over the layers, and the largest, with its layer. They are `None` where the artifact has no report or the
    error is not finite, and so are, without a report, `method` and `damping` (the largest that GPTQ took). `level_clips` are
    those that occur, `None` for activations without one.
    """

    pattern: str
    count: int
    format: str
    outputs: int
    inputs: int
    weight_bits: int
    activation_bits: int
    outliers: int
    bytes: int
    method: str | None
    relative_error: float | None
    worst_error: float | None
    worst_layer: str | None
    damping: float | None
    level_clips: tuple[tuple[int, int] | None, ...] = (None,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseKind:
    """Parameters that are not quantized, equal but for the number of their block; `bytes` of all of them, and why."""

    pattern: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactReport:
    """Everything that an artifact's manifests and its report say. `rows` are the report's own, one per layer."""

    path: str
    fingerprint: str
    written_by: str
    config: Mapping[str, Any] | None
    recipe: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    dtype: str
    parts: int
    has_tokenizer: bool
    layers: tuple[LayerKind, ...]
    dense: tuple[DenseKind, ...]
    sizes: Sizes
    rows: tuple[Mapping[str, Any], ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about formats that do not do what one may expect of them."""
        return (EXPANDED,) if any("2:4" in kind.format for kind in self.layers) else ()

    def worst(self, count: int = WORST) -> list[Mapping[str, Any]]:
        """The rows with the largest relative errors, the worst first."""
        return sorted(self.rows, key=_error, reverse=True)[:count]

    def snr_db(self, error: float | None) -> float | None:
        """A relative error in decibels; `None` for an exact layer, or none known."""
        return -20 * math.log10(error) if error else None

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "artifact": self.path,
            "fingerprint": self.fingerprint,
            "written_by": self.written_by,
            "model_type": None if self.config is None else self.config.get("model_type"),
            "recipe": self.recipe,
            "provenance": self.provenance,
            "dtype": self.dtype,
            "parts": self.parts,
            "has_tokenizer": self.has_tokenizer,
            "quantized_layers": sum(kind.count for kind in self.layers),
            "quantized": [dataclasses.asdict(kind) | {"snr_db": self.snr_db(kind.relative_error)} for kind in self.layers],
            "unquantized": [dataclasses.asdict(kind) for kind in self.dense],
            "notes": list(self.notes),
            "worst": [row["path"] for row in self.worst()],
            "bits_per_weight": self.sizes.bits_per_weight,
            "size_relative_to_fp16": self.sizes.relative_to_fp16,
            "bytes": self.sizes.all_bits // 8,
            "parameters": self.sizes.all_parameters,
            "bytes_on_disk": self.sizes.disk_bytes,
            "layers": list(self.rows),
        }


def read_report(path: str | os.PathLike[str]) -> ArtifactReport:
    """Read what the artifact in directory `path` says of itself: manifests, and its `report.jsonl` if it has one.

    Raises:
        QuikError: there is no artifact, it is unfinished or from a newer format, or a file is missing, truncated or was added.
    """
    reader = Reader(path, verify=False)
    manifest = reader.manifest
    rows = tuple(reader.report())
    by_path = {str(row["path"]): row for row in rows}
    packed: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
    dense: dict[Any, list[str]] = defaultdict(list)
    for name, part in reader.parts.items():
        for owner, static in part.packed.items():
            data = {array.rpartition(".")[2]: row for array, row in part.arrays.items() if array.rpartition(".")[0] == owner}
            weight = rebuild(static, data, owner)
            method = by_path.get(owner, {}).get("method")
            packed[pattern_of(name, owner), weight.shape, weight.base, weight.label, method].append((owner, weight))
        for array, row in part.arrays.items():
            if array.rpartition(".")[0] not in part.packed:
                dense[pattern_of(name, array), row.shape, row.dtype, _reason(manifest.recipe, name, array)].append(array)
    return ArtifactReport(
        path=str(reader.path),
        fingerprint=manifest.fingerprint,
        written_by=f"quikjax {manifest.quikjax}",
        config=manifest.config,
        recipe=manifest.recipe,
        provenance=manifest.provenance,
        dtype=manifest.dtype,
        parts=len(manifest.parts),
        has_tokenizer=any(file.startswith("tokenizer/") for file in manifest.files),
        layers=tuple(_kind(key[0], key[-1], members, by_path) for key, members in packed.items()),
        dense=tuple(
            DenseKind(
                pattern=pattern,
                count=len(members),
                shape=shape,
                dtype=dtype,
                bytes=len(members) * math.prod(shape) * dtype_bits(dtype) // 8,
                reason=reason,
            )
            for (pattern, shape, dtype, reason), members in dense.items()
        ),
        sizes=sizes(path),
        rows=rows,
    )


def _kind(pattern: str, method: str | None, members: list[tuple[str, Any]], rows: Mapping[str, Mapping[str, Any]]) -> LayerKind:
    weight = members[0][1]
    found = [rows[path] for path, _ in members if path in rows]
    worst = max(found, key=_error, default=None)
    known = bool(found) and all(row["relative_error"] is not None for row in found)
    return LayerKind(
        pattern=pattern,
        count=len(members),
        format=weight.label,
        outputs=weight.outputs,
        inputs=weight.inputs,
        weight_bits=weight.weight_bits,
        activation_bits=weight.activation_bits,
        outliers=weight.inputs - weight.base,
        bytes=sum(weight.bits() for _, weight in members) // 8,
        method=method,
        relative_error=math.sqrt(sum(row["relative_error"] ** 2 for row in found) / len(found)) if known else None,
        worst_error=None if worst is None else worst["relative_error"],
        worst_layer=None if worst is None else worst["path"],
        damping=max((row["damping"] for row in found if row["damping"] is not None), default=None),
        level_clips=tuple(
            sorted({getattr(weight, "level_clip", None) for _, weight in members}, key=lambda clip: clip or (0, 0))
        ),
    )


def _error(row: Mapping[str, Any]) -> float:
    """A report holds null for an error that is not finite."""
    return math.inf if row["relative_error"] is None else float(row["relative_error"])


def pattern_of(part: str, path: str) -> str:
    """`path` with `*` for the number of the block that its part is.

    >>> pattern_of("model.layers.3", "model.layers.3.mlp.up_proj.weight"), pattern_of("rest", "model.norm.weight")
    ('model.layers.*.mlp.up_proj.weight', 'model.norm.weight')
    """
    return path if part == REST else f"{part.rpartition('.')[0]}.*.{path.removeprefix(part + '.')}"


def _reason(recipe: Mapping[str, Any] | None, part: str, path: str) -> str:
    """Say why a parameter was left as it is."""
    if recipe is None:
        return "no recipe is recorded"
    try:
        rule = Recipe.model_validate(recipe).rule_for(path)
    except ValidationError:
        return "the recorded recipe is another version's"
    if rule is None:
        return "no rule of the recipe matches"
    return "outside the blocks, where nothing is quantized" if part == REST else "not a linear layer"
