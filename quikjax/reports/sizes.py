"""Sizes of quantized layers, and of files on disk."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quikjax.checkpoint import Reader


class LayerSizes(NamedTuple):
    """All quantized layers together, everything counted: codes, outliers, scale, reduced, columns."""

    layers: int
    weights: int
    bits: float

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight; 16 where nothing was quantized."""
        return self.bits / self.weights if self.weights else 16.0

    @property
    def relative_to_fp16(self) -> float:
        """Size as a share of the same layers in FP16."""
        return self.bits_per_weight / 16

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "quantized_layers": self.layers,
            "bits_per_weight": self.bits_per_weight,
            "size_relative_to_fp16": self.relative_to_fp16,
        }


def sizes_of_layers(report: Sequence[Mapping[str, Any]]) -> LayerSizes:
    """From a report's rows (`LayerResult.as_json`)."""
    weights = [int(row["inputs"]) * int(row["outputs"]) for row in report]
    bits = sum(float(row["bits_per_weight"]) * count for row, count in zip(report, weights, strict=True))
    return LayerSizes(len(report), sum(weights), bits)


def size_of_artifact(path: str | os.PathLike[str]) -> int:
    """Bytes of all files of an artifact, as its manifest lists them."""
    return Reader(path, verify=False).disk_bytes
