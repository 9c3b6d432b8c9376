"""Compute peak memory by formulas that a person can check: while a model is quantized, and while it runs.

Every number of bytes here is counted, not measured. What XLA adds (fragments, compiled code, a second copy where it does not
reuse a buffer) is not in it: leave a tenth of the device free.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from quikjax.models.attention import _CHUNK as ATTENTION_CHUNK
from quikjax.models.base import Config
from quikjax.models.memory import cache_bytes, physical_memory
from quikjax.quantizing.model import KEPT_BYTES

MAX_DEVICES = 1024


class Group(NamedTuple):
    """Layers of a block that read one tensor: its `inputs` columns, and the `outputs` of each layer."""

    inputs: int
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """The figures that a model's peak memory depends on.

    `groups` are those of one block, `quantized` those of them with at least one quantized layer. Of the largest block:
    `block_parameters`, how many of them are in quantized layers, and the bytes of these packed. Of the whole model:
    `block_bytes` (all blocks as they run, packed or not) and `rest_bytes` (embeddings, head, last norm). `dequantized`: bytes of
    the dense weights that one group of codebook layers is multiplied as. `itemsize`: bytes of one activation and of one
    parameter that is not quantized.
    """

    config: Config
    itemsize: int
    groups: tuple[Group, ...]
    quantized: tuple[Group, ...]
    block_parameters: int
    block_quantized: int
    block_packed: int
    block_bytes: int
    rest_bytes: int
    dequantized: int = 0


class Quantizing(NamedTuple):
    """Peak bytes while a model is quantized, on the device and in host memory (on a CPU the two are one).

    `activations` are those in host memory; `spilled` is 0, or what they all take, where that is on disk.
    """

    block: int
    work: int
    rest: int
    activations: int
    spilled: int

    @property
    def device(self) -> int:
        """The larger of the two phases: embedding the tokens, then one block after the other."""
        return max(self.rest, self.block + self.work)

    @property
    def host(self) -> int:
        """Activations of the calibration tokens, or of one sequence where they exceed their budget."""
        return self.activations


class Running(NamedTuple):
    """Peak bytes while a model runs: weights of the blocks, of the rest, the cache of keys and values, and temporaries."""

    blocks: int
    rest: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """On one device."""
        return self.blocks + self.rest + self.cache + self.temporaries


def temporaries(footprint: Footprint, batch: int, length: int) -> int:
    """The largest bytes in use between two layers, reading `batch` texts of `length` tokens at once. With `d` the itemsize:

    2 M H d                                  the hidden state and its residual, M = batch length rows
    + the largest of
      M (K (d + 1) + sum N (8 + d))          a group of layers: input, its codes; int32 sums, float32 results, outputs
      + sum N K d                            and, of codebook layers, their dense weights
      12 batch heads min(512, length) length + 2 M heads head d
                                             attention in chunks of 512 queries: scores, exponentials and a copy, float32
      4 batch vocabulary                     logits of each text's last token
    """
    config, d = footprint.config, footprint.itemsize
    rows = batch * length
    layers = max(rows * (group.inputs * (d + 1) + sum(group.outputs) * (8 + d)) for group in footprint.groups)
    layers += footprint.dequantized
    scores = 12 * batch * config.heads * min(ATTENTION_CHUNK, length) * length
    attention = scores + 2 * rows * config.heads * config.head_size * d
    return 2 * rows * config.hidden_size * d + max(layers, attention, 4 * batch * config.vocab_size)


def running(footprint: Footprint, batch: int, length: int) -> Running:
    """Weights, cache and `temporaries` of `batch` texts of `length` tokens, prompt and continuation together."""
    return Running(
        footprint.block_bytes,
        footprint.rest_bytes,
        cache_bytes(footprint.config, footprint.itemsize, batch, length),
        temporaries(footprint, batch, length),
    )


def activation_bytes(state_size: int, inputs: Iterable[int], tokens: int, itemsize: int) -> int:
    """Bytes of all calibration activations while a block is quantized whose quantized groups read `inputs` columns each.

    With `T` tokens, `H` the `state_size` of the configuration and `d` the itemsize:

        2 T H d + kept                           what enters the block and what leaves it
        kept = T K d                             for each group in turn, while their sum is at most KEPT_BYTES (1 GiB)
    """
    kept = 0
    for width in inputs:
        if kept + tokens * width * itemsize <= KEPT_BYTES:
            kept += tokens * width * itemsize
    return 2 * tokens * state_size * itemsize + kept


def held_activations(whole: int, samples: int, budget: int) -> int:
    """Of `whole` bytes of activations, those in host memory: all within the budget, or one of `samples` sequences at a time.

    >>> held_activations(1000, 10, 1000), held_activations(1000, 10, 999)
    (1000, 100)
    """
    return whole if whole <= budget else -(-whole // samples)


def budget_problem(held: int, budget: int) -> str | None:
    """Say why a budget for activations is too small for the `held` bytes that must be in memory at once, or return `None`."""
    if held <= budget:
        return None
    return (
        f"the activations of one calibration sequence take {held / 1e6:.3g} MB at once and --activation-memory allows "
        f"{budget / 1e6:.3g} MB; give --activation-memory {math.ceil(held / 1e6) / 1e3:g} (GB) or more, or a smaller --seqlen"
    )


def default_activation_bytes() -> int:
    """The budget for activations of who gives none: a quarter of this machine's memory."""
    return physical_memory() // 4


def quantizing(
    footprint: Footprint,
    samples: int,
    seqlen: int,
    *,
    gptq: bool,
    descent: bool = False,
    distills: bool = False,
    activation_budget: int | None = None,
) -> Quantizing:
    """Peak memory of block-by-block quantization with `samples` sequences of `seqlen` tokens (0: without data).

    On the device, with `P` parameters in the block, `Q` of them in quantized layers, `d` the itemsize, and for each group its
    width `K` and its widest layer `N`:

        block = d P + d Q + packed               the block as published, its dequantized copies, its packed weights
        work  = the largest of, over the quantized groups,
          4 (5 K^2)                              GPTQ: the Hessian, it permuted, and its factorization
          4 (3 K^2 + 5 N K)                      GPTQ: Hessian, factor and its copy; W, it permuted, transposed, updated
          4 (4 K^2 + 8 N K)                      descent, too: Hessian, factor, curvature and a copy; W and what goes with it
          4 (2 K^2) + temporaries(1, seqlen)     observing one sequence: the Hessian and what is added to it
          4 (3 N K)                              rounding to nearest, in place of the first two

        and, of a block that is distilled, over all its groups,
          4 (8 P) + 4 seqlen (3 sum N + 4 sum K) in float32: the original, values, the best of them, those of the next step,
                                                 gradient, two moments, what values are rounded to; one sequence on its way back

    or, before the first block, the embeddings (`rest`). In host memory, with `A = activation_bytes` of `samples seqlen` tokens:

        activations = A                          while that is within the budget (`None`: whatever it is)
                      A / samples                otherwise, one sequence at a time; A is then on disk (`spilled`)
    """
    d, tokens = footprint.itemsize, samples * seqlen
    work = 0
    for group in footprint.quantized:
        k, n = group.inputs, max(group.outputs)
        steps = [5 * k * k, 3 * k * k + 5 * n * k] if gptq else [3 * n * k]
        if descent:
            steps.append(4 * k * k + 8 * n * k)
        observing = 4 * 2 * k * k + temporaries(footprint, 1, seqlen) if tokens else 0
        work = max(work, 4 * max(steps), observing)
    if distills:
        widths = sum(3 * sum(group.outputs) + 4 * group.inputs for group in footprint.groups)
        work = max(work, 4 * (8 * footprint.block_parameters + seqlen * widths))
    inputs = [group.inputs for group in footprint.quantized]
    whole = activation_bytes(footprint.config.state_size, inputs, tokens, d)
    held = whole if activation_budget is None else held_activations(whole, samples, activation_budget)
    return Quantizing(
        block=d * (footprint.block_parameters + footprint.block_quantized) + footprint.block_packed,
        work=work,
        rest=footprint.rest_bytes,
        activations=held,
        spilled=whole if held < whole else 0,
    )


def devices_needed(need: Running, memory: int, config: Config) -> int | None:
    """The fewest devices of `memory` bytes each that hold a running model, or `None` if none do.

    Blocks are split evenly and heads stay whole, so the number divides the heads; keys and values are split by their heads,
    and repeated where there are fewer of them; embeddings and temporaries are on every device. With `n` devices each holds

        blocks / n + cache / min(n, kv_heads) + rest + temporaries
    """
    for n in divisors(config.heads):
        each = -(-need.blocks // n) + -(-need.cache // min(n, config.kv_heads)) + need.rest + need.temporaries
        if each <= memory:
            return n
    return None


def divisors(number: int) -> Sequence[int]:
    """Divisors in order, up to `MAX_DEVICES`.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, min(number, MAX_DEVICES) + 1) if number % n == 0]
