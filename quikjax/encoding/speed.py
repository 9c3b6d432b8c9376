"""How fast an encoder is, in tests such as `en128`, and how fast each product of its blocks is as quantized and in floats.

An encoder reads all of its texts at once, so that the rows of its products are batch times length. With few of them what comes
with a quantized product (the split before it, its scales behind it) may cost more than it saves; `quantize --keep` leaves such a
product in floats. What is predicted of a GPU before there is a model, `planning.switches` counts; this is measured.
"""

import dataclasses
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from quikjax.encoding.classify import class_logits
from quikjax.encoding.embed import embedding_head
from quikjax.encoding.text_encoder import encode_texts
from quikjax.errors import QuikError
from quikjax.models import stacked
from quikjax.models.encoder import CLASSIFIER, Encoder
from quikjax.models.stacked import Layout
from quikjax.rounds import Prepared, Speed, in_turn, peak_bytes, speeds
from quikjax.speed_tests import EncoderTest
from quikjax.weights.compiled import why_no_compiled_products
from quikjax.weights.formats import dequantize, is_packed
from quikjax.weights.linear import linears
from quikjax.weights.panels import fits_panels, in_panels, of_layer
from quikjax.weights.tiled import node_at

# A sample of a product is at least so long: below, the host's part of a call would be most of what its clock shows.
_SAMPLE_SECONDS = 5e-3
_MOST_CALLS = 100

# The layers of one product: `weight` and, where there is one, `bias` of each. In a scan, those of all blocks, stacked.
Layers = list[dict[str, Any]]


class RunningEncoder:
    """An encoder in the form that runs, to be measured. It needs no tokenizer.

    A classifier of texts ends in its logits, any other model in the mean over tokens, normalized, as `embed` gives it.

    Args:
        model: dense or with packed weights. It is kept: unquantized products are made of its weights.
        unrolled: as `stacked.stack` takes it.
    """

    def __init__(self, model: Encoder, *, unrolled: bool | None = None) -> None:
        self.model = model
        self.config = model.config
        self.cpu = jax.default_backend() == "cpu"
        self.panels = self.cpu and why_no_compiled_products() is None
        self.layout, self.params = stacked.stack(model, widen=self.cpu, panels=self.panels, unrolled=unrolled)
        self.head = class_logits if model.config.head == CLASSIFIER else embedding_head("mean", True)

    def prepare(self, test: EncoderTest) -> Prepared:
        """The encoder made ready for a test: random tokens, no padding, one compiled program."""
        shape = (test.batch, test.length)
        ids = jnp.asarray(np.random.default_rng(0).integers(0, self.config.vocab_size, shape), jnp.int32)
        lengths, types = jnp.full(test.batch, test.length, jnp.int32), jnp.zeros(shape, jnp.int32)
        began = time.perf_counter()
        traced = jax.jit(functools.partial(encode_texts, self.layout, self.head, bool(self.config.token_types)))
        program = traced.lower(self.params, ids, lengths, types).compile()
        compiled = time.perf_counter() - began

        def run() -> float:
            start = time.perf_counter()
            jax.block_until_ready(program(self.params, ids, lengths, types))
            return time.perf_counter() - start

        run()
        return Prepared(run, compiled, peak_bytes(program))


def measure(
    encoders: Mapping[str, RunningEncoder], tests: Sequence[EncoderTest], rounds: int
) -> dict[str, list[Speed[EncoderTest]]]:
    """Every encoder in every test: one run to warm up, then the encoders in turn, `rounds` times.

    Raises:
        QuikError: texts of a test are longer than an encoder reads, or `rounds` is not positive.
    """
    for encoder in encoders.values():
        for test in tests:
            if test.length > encoder.config.context_length:
                raise QuikError(
                    f"{test.name} exceeds the {encoder.config.context_length} tokens that {type(encoder.model).__name__} reads; "
                    "give a smaller test"
                )
    prepare = {name: encoder.prepare for name, encoder in encoders.items()}
    return speeds(tests, prepare, lambda test: test.batch * test.length, rounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductSpeed:
    """Measured microseconds of one product of a block, layers that read one tensor, with `rows` rows.

    `quantized` is the product as the model runs it (split, products, epilogue), `floats` that of its dequantized weights.
    `layers` are named within the block.
    """

    group: str
    layers: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    rows: int
    quantized: float
    floats: float

    @property
    def gains(self) -> bool:
        """Whether it is faster as quantized."""
        return self.quantized < self.floats


def product_speeds(encoder: RunningEncoder, rows: int, rounds: int) -> tuple[ProductSpeed, ...]:
    """Time the products of an encoder's blocks with packed weights, in order of execution; none of an unquantized model's.

    Timed are the first block that has packed weights and those behind it that are alike, one after the other in one program, so
    that weights come from memory as they do in the model. The tensor that is read is there before, and nothing is added to the
    result: activations that a kernel would compute in its split, and residuals, are in neither time.

    Args:
        encoder: the model.
        rows: batch times length.
        rounds: samples of each form, of which the median counts; at least 1.
    """
    found = first_packed_run(encoder)
    if found is None:
        return ()
    number, blocks = found
    packed, wide = encoder.params["runs"][str(number)], [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    timed = []
    for group, layers in blocks[0].groups.items():
        weights = [node_at(wide[0], layer)["weight"] for layer in layers]
        if not any(map(is_packed, weights)):
            continue
        outputs, (inputs, *_) = zip(*map(_shape, weights), strict=True)
        x = jax.random.normal(jax.random.key(0), (rows, inputs), jnp.dtype(encoder.layout.dtype))
        forms = {"quantized": running_layers(encoder.layout, packed, layers), "floats": float_layers(encoder, wide, layers)}
        runs = {name: _repeated(encoder, x, form, len(blocks)) for name, form in forms.items()}
        micro = {name: statistics.median(samples) / len(blocks) * 1e6 for name, samples in in_turn(runs, rounds).items()}
        timed.append(ProductSpeed(group=group, layers=layers, outputs=outputs, inputs=inputs, rows=rows, **micro))
    return tuple(timed)


def keep_pattern(layers: Iterable[str]) -> str:
    r"""The pattern by which `quantize --keep` leaves these layers of every block in floats, and no others.

    >>> keep_pattern(["output.dense"])
    '\\d\\.output\\.dense'
    """
    names = [re.escape(layer) for layer in layers]
    # The block's number stands before, or BERT's output.dense were found in its attention.output.dense.
    return rf"\d\.{names[0]}" if len(names) == 1 else rf"\d\.({'|'.join(names)})"


def first_packed_run(encoder: RunningEncoder) -> tuple[int, list[Any]] | None:
    """The number of the first run of blocks that has packed weights, and its blocks as they were loaded."""
    blocks = list(encoder.model.blocks.values())
    first = 0
    for number, run in enumerate(encoder.layout.runs):
        leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(blocks[first])), is_leaf=is_packed)
        if any(map(is_packed, leaves)):
            return number, blocks[first : first + run.count]
        first += run.count
    return None


def running_layers(layout: Layout, params: Any, layers: Sequence[str]) -> Layers | list[Layers]:
    """The parameters of a product as the model runs them: those of a run of blocks stacked or, unrolled, of each block."""
    if layout.unrolled:
        return [[node_at(params[str(i)], layer) for layer in layers] for i in range(len(params))]
    return [node_at(params, layer) for layer in layers]


def float_layers(encoder: RunningEncoder, blocks: Sequence[Any], layers: Sequence[str]) -> Layers | list[Layers]:
    """The same, with packed weights dequantized to what an unquantized model would have in their place."""
    # On a CPU dense matrices are held in float32 or in panels, as `stacked.stack` does.
    dtype = jnp.float32 if encoder.cpu else jnp.dtype(encoder.layout.dtype)

    def in_floats(layer: dict[str, Any]) -> dict[str, Any]:
        weight = layer["weight"]
        return {**layer, "weight": (dequantize(weight) if is_packed(weight) else weight).astype(dtype)}

    made = [[in_floats(node_at(block, layer)) for layer in layers] for block in blocks]
    stack = not encoder.layout.unrolled

    def put(*parts: Array) -> Any:
        if encoder.panels and fits_panels(parts[0]):
            return in_panels(parts, stacked=stack)
        return jnp.stack(parts) if stack else parts[0]

    return jax.tree.map(put, *made) if stack else jax.tree.map(put, made)


def product(x: Float[Array, "rows k"], layers: Layers) -> list[Float[Array, "rows _"]]:
    """The results of layers that read one tensor."""
    return linears(x, [layer["weight"] for layer in layers], [layer.get("bias") for layer in layers])


# From the tensor and the layers of all blocks to the tensor, there once every block's product is, and the last block's results.
@functools.partial(jax.jit, static_argnames="count")
def _in_a_scan(
    x: Float[Array, "rows k"], layers: Layers, count: int
) -> tuple[Float[Array, "rows k"], list[Float[Array, "rows _"]]]:
    def turn(carry: tuple[Array, list[Array]], number: Array) -> tuple[tuple[Array, list[Array]], None]:
        x, before = carry
        # An element of `x` changes from block to block, or XLA would prepare what it makes of `x` alone before the loop.
        x = x.at[0, 0].set(jnp.clip(before[0][0, 0], -1, 1))
        return (x, product(x, of_layer(layers, number))), None

    like = jax.eval_shape(product, x, of_layer(layers, jnp.int32(0)))
    nothing = [jnp.zeros(y.shape, y.dtype) for y in like]
    return jax.lax.scan(turn, (x, nothing), jnp.arange(count, dtype=jnp.int32))[0]


@jax.jit
def _one_by_one(x: Float[Array, "rows k"], blocks: list[Layers]) -> tuple[Float[Array, "rows k"], list[Float[Array, "rows _"]]]:
    ys: list[Array] = []
    for block in blocks:
        x, ys = jax.lax.optimization_barrier((x, _PRODUCT(x, block)))
    return x, ys


_PRODUCT = jax.jit(product)  # blocks that are alike are traced and lowered once


def _shape(weight: Any) -> tuple[int, int]:
    """`(N, K)` of a weight."""
    return (weight.outputs, weight.inputs) if is_packed(weight) else (weight.shape[0], weight.shape[1])


def _repeated(
    encoder: RunningEncoder, x: Float[Array, "rows k"], layers: Layers | list[Layers], blocks: int
) -> Callable[[], float]:
    """A function that multiplies in all blocks, so often that it can be measured, and returns the mean seconds of once."""
    program = _one_by_one if encoder.layout.unrolled else functools.partial(_in_a_scan, count=blocks)

    def run(calls: int) -> float:
        began, read = time.perf_counter(), x
        for _ in range(calls):
            # What one call ends with the next begins with: they never run side by side.
            read, ys = program(read, layers)
        jax.block_until_ready(ys)
        return (time.perf_counter() - began) / calls

    run(1)  # compiled
    return functools.partial(run, min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS / run(1))))
