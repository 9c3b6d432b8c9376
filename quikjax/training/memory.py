"""How much memory and time a recovery takes, from an artifact's manifest, before anything is read.

Bytes are counted by formulas that a person can check; what XLA adds is not in them. Seconds are floating-point operations over
what this machine does a second on a product that is timed first: right within a factor of two.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from quikjax.checkpoint import REST, Reader
from quikjax.checkpoint.parts import rebuild
from quikjax.errors import QuikError
from quikjax.models.registry import abstract_model
from quikjax.training.blocks import KEPT_BYTES
from quikjax.training.distill import CHUNK
from quikjax.training.recoverable import check_recoverable, is_encoder
from quikjax.training.settings import RecoverySettings
from quikjax.weights.quik import QuikWeight

# The share of a large product's speed that a whole step reaches: the rest goes into everything that is no product. From one run
# of SmolLM2-135M on two busy cores, 26 s a step of 2048 tokens where the products alone would have taken 14.
_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and seconds of a recovery. `total` bytes are all together: on a CPU device and host are one memory."""

    student: int
    teacher: int
    moving: int
    work: int
    hidden_states: int
    step_seconds: float
    evaluation_seconds: float
    seconds: float

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.moving + self.work + self.hidden_states

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self) | {"total": self.total}

    def text(self, size: Callable[[float], str], duration: Callable[[float], str]) -> str:
        """Two lines for people; the arguments spell bytes and seconds."""
        return (
            f"memory       about {size(self.total)}: student {size(self.student)}, teacher {size(self.teacher)}, what moves "
            f"{size(self.moving)}, one step {size(self.work)}, the teacher's hidden states {size(self.hidden_states)}\n"
            f"time         about {duration(self.seconds)} here: {duration(self.step_seconds)} a step, "
            f"{duration(self.evaluation_seconds)} an evaluation"
        )


def estimate(artifact: str | os.PathLike[str], settings: RecoverySettings) -> Estimate:
    """Cost of recovering `artifact`. With `P` weights in blocks, `M` numbers that move, `T` tokens a step, `H` the hidden size

        student   2 P + 4 rest                     codes in a byte, as read and in the order of x; float32 outside the blocks
        teacher   4 (P + rest)
        moving    24 M                             values, the optimizer's two moments, the best so far, gradient and update
        work      4 T H blocks + products + 24 chunk vocabulary + 4 T (3 sum N + 4 sum K)
                  what enters each block; the layers' products, if all of them are within KEPT_BYTES; logits of a chunk; one
                  block on the way back
        hidden    4 seqlen H windows               of the teacher, for windows that are seen more than once

    Of an encoder, whose hidden states are compared, nothing is computed again on the way back:

        work      4 T (3 sum N + 4 sum K) + 8 T seqlen heads blocks        all blocks on the way back; attention
        hidden    4 seqlen H blocks (validation + batch)                   of every block

    Raises:
        QuikError: there is no artifact, or one of parameters without a model.
    """
    reader = Reader(artifact, verify=False)
    config = abstract_model(check_formats(reader)).config
    weights = rest = moves = outputs = inputs = 0
    for name, part in reader.parts.items():
        for owner, static in part.packed.items():
            data = {path: row for path, row in part.arrays.items() if path.rpartition(".")[0] == owner}
            weight = rebuild(static, {path.rpartition(".")[2]: row for path, row in data.items()}, owner)
            n, k = weight.outputs, weight.inputs
            weights, outputs, inputs = weights + n * k, outputs + n, inputs + k
            moves += n + n * (k - weight.base) + (n * k if settings.codes else 0)
        for path, row in part.arrays.items():
            if path.rpartition(".")[0] in part.packed:
                continue
            count = 1
            for length in row.shape:
                count *= length
            owner = path.rpartition(".")[0]
            moves += count if len(getattr(part.arrays.get(f"{owner}.weight"), "shape", ())) == 1 else 0
            if name == REST:
                rest += count
            else:
                weights += count
    tokens = settings.batch * settings.seqlen
    length, width = settings.seqlen, config.heads * config.head_size
    layers, attention = 2 * weights, 2 * length * width * config.layers
    if is_encoder(reader.manifest.config):
        head = 0
        work = 4 * tokens * (3 * outputs + 4 * inputs) + 8 * tokens * length * config.heads * config.layers
        states = config.layers * (settings.validation + settings.batch)
        teaching = tokens * (layers + attention)  # at every step
    else:
        head = 2 * config.vocab_size * config.hidden_size
        products = 4 * tokens * outputs
        work = 4 * tokens * config.hidden_size * config.layers + (products if products <= KEPT_BYTES else 0)
        work += 24 * CHUNK * config.vocab_size + 4 * tokens * (3 * outputs + 4 * inputs) // config.layers
        again = settings.windows is not None and settings.steps * settings.batch > settings.windows
        states = settings.validation + (settings.windows or 0 if again else 0)
        teaching = 0
    a_step = tokens * (3 * layers + (2 * layers if settings.codes else 0) + 3 * head + 6 * attention) + teaching
    an_evaluation = settings.validation * length * (layers + 3 * head + attention)
    at_first = settings.validation * length * (layers + attention)
    rate = _EFFICIENCY * product_rate()
    evaluations = 1 + -(-settings.steps // settings.evaluate_every)
    return Estimate(
        student=2 * weights + 4 * rest,
        teacher=4 * (weights + rest),
        moving=24 * moves,
        work=work,
        hidden_states=4 * settings.seqlen * config.hidden_size * states,
        step_seconds=a_step / rate,
        evaluation_seconds=an_evaluation / rate,
        seconds=(settings.steps * a_step + evaluations * an_evaluation + at_first) / rate,
    )


def check_formats(reader: Reader) -> dict[str, Any]:
    """Look, in its manifests alone, whether everything packed in an artifact can be trained; the model's configuration.

    Raises:
        QuikError: as `check_recoverable`, or a layer is packed in another format than QUIK's.
    """
    config = check_recoverable(reader.manifest.config, reader.path)
    for part in reader.parts.values():
        for path, static in part.packed.items():
            if static["class"] != QuikWeight.__name__:
                raise QuikError(f"{path} is a {static['class']}; only layers in QUIK format can be recovered")
    return config


def product_rate(size: int = 1024, times: int = 5) -> float:
    """Floating-point operations a second of a float32 product of two matrices of `size`, the median of `times`."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(seconds)[times // 2]
