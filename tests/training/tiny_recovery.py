"""A tiny artifact with its original, and recoveries of it: for the tests, and for the processes that `test_resume.py` kills."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax  # noqa: F401  (before the fork)
import orbax.checkpoint  # noqa: F401
from safetensors.numpy import save_file

from quikjax.checkpoint import Reader, Writer
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.testing import tiny_tokenizer, write_tiny_checkpoint
from quikjax.texts import calibration_text
from quikjax.training import loop
from quikjax.training.recover import Recovered, recover
from quikjax.training.settings import RecoverySettings
from quikjax.weights.quik import QuikWeight

SETTINGS = RecoverySettings(steps=9, seqlen=64, windows=6, validation=3, evaluate_every=4, sigma_rate=2e-2)


def tokens(_tokenizer: Any = None, *, count: int = 16) -> np.ndarray:
    """A text of `count` windows, a byte a token."""
    return np.frombuffer(calibration_text("pydoc").content.encode(), np.uint8)[: count * SETTINGS.seqlen].astype(np.int32)


def write_model(directory: Path, fields: dict[str, Any] | None = None, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A published directory: the tiny LLaMA, or any family with the byte tokenizer."""
    if fields is None:
        return write_tiny_checkpoint(directory, num_hidden_layers=2)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    assert weights is not None
    save_file(weights, directory / "model.safetensors")
    tiny_tokenizer().save_pretrained(str(directory))
    return directory


def shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a family's parameters as its checkpoints hold them."""
    model = abstract_model(fields)
    flat = dotted(pure_params(model))
    return {path: tuple(leaf.shape)[:: -1 if type(model).lies_transposed(path) else 1] for path, leaf in flat.items()}


def quantize(model: Path, out: Path, recipe: Any = "quik-4b", off: float = 1.3) -> Path:
    """An artifact of `model` whose scales are all off by a factor: surely something to recover, in a few steps."""
    exact = out.with_name(out.name + "-exact")
    quantize_checkpoint(model, exact, recipe, lambda _: tokens(count=2).reshape(2, -1))
    reader = Reader(exact)
    manifest = reader.manifest
    with Writer(out, config=manifest.config, recipe=manifest.recipe, provenance=manifest.provenance) as writer:
        for name in reader.parts:
            params = {path: _scaled(leaf, off) for path, leaf in reader.read_part(name).items()}
            writer.write_part(name, params)
        writer.finish(tokenizer=reader.tokenizer(), report=reader.report())
    return out


def _scaled(leaf: Any, factor: float) -> Any:
    if not isinstance(leaf, QuikWeight):
        return leaf
    scale = np.asarray(leaf.scale) * np.float32(factor)
    total = np.asarray(leaf.qweight, np.int64).sum(axis=1)
    return dataclasses.replace(leaf, scale=scale, reduced=(scale.astype(np.float64) * total).astype(np.float32))


def prepare(directory: Path) -> None:
    """What `recover_resumably` needs."""
    quantize(write_model(directory / "model"), directory / "artifact")


def recover_resumably(directory: Path, started: Callable[[], None]) -> Recovered:
    """Recover `directory/artifact` into `directory/out`, saving after every step, so that kills meet every moment of it."""
    loop.SAVE_SECONDS = 0.0
    started()
    return recover(directory / "artifact", directory / "out", tokens, SETTINGS, original=directory / "model")
