"""A tiny encoder and a task that it can learn: which of two alphabets a text is written in."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from quikjax.checkpoint.load import load
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.testing import tiny_tokenizer
from quikjax.training import loop
from quikjax.training.train import Trained, train
from quikjax.training.train_settings import TrainSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from encoder_variants import VARIANTS
from random_weights import random_weights

SETTINGS = TrainSettings(steps=12, batch=8, longest=16, evaluate_every=4, rate=5e-3)


def write_encoder(directory: Path, name: str = "minilm", **fields: object) -> Path:
    """A directory as published: an encoder of one block over bytes."""
    config = {**VARIANTS[name], "vocab_size": 257, "num_hidden_layers": 1, "num_attention_heads": 4, **fields}
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), dotted(pure_params(abstract_model(config))))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_weights(shapes, 0), directory / "model.safetensors")
    tiny_tokenizer().save_pretrained(str(directory))
    return directory


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Labelled texts of a's and b's, or of y's and z's."""
    rng = np.random.default_rng(seed)
    lines = ["sentence\tlabel"]
    for _ in range(count):
        label = int(rng.integers(2))
        letters = list(("yz", "ab")[label])
        text = "".join(rng.choice(letters, size=int(rng.integers(5, 12))))
        lines.append(f"{text}\t{['less', 'more'][label]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare(directory: Path) -> None:
    """What `train_resumably` needs."""
    write_encoder(directory / "model")
    write_rows(directory / "texts.tsv", 64, 0)
    write_rows(directory / "held.tsv", 40, 1)


def train_resumably(directory: Path, started: Callable[[], None]) -> Trained:
    """Train `directory/model` at W4A4 into `directory/out`, saving after every step, so that kills meet every moment of it."""
    loop.SAVE_SECONDS = 0.0
    model, tokenizer = load(directory / "model")
    started()
    held = directory / "held.tsv"
    return train(model, tokenizer, directory / "texts.tsv", directory / "out", SETTINGS, validation=held, recipe="rtn-w4a4")
