"""A log that grows while a model is quantized, for `tail -f` and for whoever asks later where the time went.

One JSON object per line:

{"run": "2026-01-31T12:00:00+00:00", "finished_blocks": 2, "blocks": 32}    a run begins, or goes on after so many blocks
{"path": "model.layers.2.self_attn.q_proj.weight", "bytes": 8454144, "seconds": 1.8, ...}    a layer is quantized
{"distilled": "model.layers.2", "steps": 100, "loss": 0.62, "seconds": 41.0}    a block's error is so much of that before

It lies in the artifact, OUT/log.jsonl (until that is whole, OUT.partial/log.jsonl), but the manifest does not list it: what that
lists has no times in it, so that the same inputs give the same bytes.
"""

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any

from quikjax.errors import resumable
from quikjax.files import finite
from quikjax.quantizing.distillation import DistillationStep
from quikjax.quantizing.params import LayerResult


class LayerLog:
    """Append to the log in the file `path`; with `anew`, what is there is removed first.

    Layers of a block that a killed run did not finish are there again after the next `run`. Every line is written at once and
    is whole, but for a last one that met a full disk or a power cut: the next run removes it.

    Raises:
        QuikError: from every method, if the disk is full or refuses. What was logged stays.
    """

    def __init__(self, path: Path, *, anew: bool) -> None:
        self.path = path
        with self._disk_errors():
            if anew:
                path.unlink(missing_ok=True)
            elif path.exists():
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def start(self, blocks: int, finished: int) -> None:
        """A run begins: so many blocks, so many of them finished by earlier runs. Its time is in UTC."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append({"run": now, "finished_blocks": finished, "blocks": blocks})

    def layer(self, layer: LayerResult, seconds: float) -> None:
        """A layer is quantized: its report, `bytes` of the packed weight, and seconds as `Progress.layer` counts them."""
        size = round(layer.bits_per_weight * layer.outputs * layer.inputs / 8)
        self._append({**layer.as_json(), "bytes": size, "seconds": round(seconds, 3)})

    def distilled(self, step: DistillationStep, seconds: float) -> None:
        """A block is distilled: its steps, its least error over that before the first, seconds since its last layer."""
        self._append({"distilled": step.block, "steps": step.steps, "loss": step.best, "seconds": round(seconds, 3)})

    def _append(self, record: dict[str, Any]) -> None:
        with self._disk_errors(), open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return resumable(f"cannot write {self.path}")
