"""An encoder and its tokenizer over many texts: sorted by length, in buckets of lengths, one compiled program for each bucket.

A text is padded on the right to the least bucket that holds it; buckets are powers of two, so that less than half of what is
computed is padding, and a dozen programs serve every text.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models import stacked
from quikjax.models.base import PADDING, Positions
from quikjax.models.encoder import Encoder
from quikjax.models.encoder_decoder import Reader, Writer
from quikjax.models.stacked import Layout
from quikjax.models.tokens import checked_transformer
from quikjax.weights.compiled import why_no_compiled_products
from quikjax.weights.panels import of_layer

# A text, or two that the model reads as a pair.
Text = str | tuple[str, str]
SHORTEST = 16  # tokens of the least bucket

# From a batch's last hidden states and positions (PADDING where there is no token) to a number of rows, under `jit`.
Head = Callable[[Any, Float[Array, "batch state hidden"], Int32[Array, "batch length"]], Float[Array, "batch width"]]


class Rows(NamedTuple):
    """Texts as tokens: `ids` and `types` of each, without padding; `cut` texts were longer than the model reads."""

    ids: list[np.ndarray]
    types: list[np.ndarray]
    cut: int


@dataclasses.dataclass(frozen=True)
class Work:
    """The cost of encoding some texts: their tokens, the texts that were cut, the lengths they were padded to, and time."""

    tokens: int
    cut: int
    buckets: tuple[int, ...]
    seconds: float
    compile_seconds: float


class TextEncoder:
    """A model and its tokenizer, for texts of any lengths.

    Args:
        model: an encoder, or an encoder-decoder with a classifier; dense or with packed weights.
        tokenizer: its tokenizer, as `load` gives it.
        length: texts are cut to so many tokens, those around them included; left out, what the model reads.
        batch_size: texts that go through the model together. The last batch is filled up, so that every bucket has one program.

    Raises:
        QuikError: the model is no encoder, there is no tokenizer, or a number is none that works.
    """

    def __init__(self, model: Any, tokenizer: Any, *, length: int | None = None, batch_size: int = 32) -> None:
        model = checked_transformer(model)
        if isinstance(model, Writer):
            raise QuikError(
                f"{type(model).__name__} writes texts and does not embed or classify them; use it with: quikjax generate"
            )
        if not isinstance(model, Encoder | Reader):
            raise QuikError(
                f"{type(model).__name__} predicts the next token and does not embed or classify texts; give an encoder (BERT, "
                "RoBERTa, DistilBERT), such as all-minilm-l6-v2"
            )
        if tokenizer is None:
            raise QuikError("the model has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
        reach = model.config.context_length
        if length is not None and not 3 <= length <= reach:
            raise QuikError(f"texts may be cut to 3 to {reach} tokens, which is what the model reads, not {length}")
        if batch_size < 1:
            raise QuikError(f"at least 1 text goes through the model at a time, not {batch_size}")
        self.model: Any = model
        self.config, self.tokenizer = model.config, tokenizer
        self.length = reach if length is None else length
        self.batch_size = batch_size
        cpu = jax.default_backend() == "cpu"
        self._layout, self._params = stacked.stack(model, widen=cpu, panels=cpu and why_no_compiled_products() is None)
        self._programs: dict[tuple[Any, ...], Any] = {}
        self.compile_seconds = 0.0

    @property
    def compiled(self) -> int:
        """How many programs have been compiled."""
        return len(self._programs)

    def run(self, texts: Sequence[Any], head: Head) -> tuple[Float[np.ndarray, "texts width"], Work]:
        """Results of `head` for each text, in the order of the texts, and what they took.

        `head` is compiled with the model, once for each bucket, and known by its identity.

        Raises:
            QuikError: `texts` is no list of texts or pairs, or has none.
        """
        rows = self.tokenize(texts)
        before, began = self.compile_seconds, time.perf_counter()
        found: list[Any] = [None] * len(rows.ids)
        buckets = set()
        for members, width in self._batches(rows):
            buckets.add(width)
            ids, types = (np.zeros((self._rows(len(rows.ids)), width), np.int32) for _ in range(2))
            lengths = np.ones(len(ids), np.int32)
            for at, member in enumerate(members):
                count = len(rows.ids[member])
                ids[at, :count], types[at, :count], lengths[at] = rows.ids[member], rows.types[member], count
            program = self._program(head, ids.shape)
            out = np.asarray(program(self._params, ids, lengths, types))
            for at, member in enumerate(members):
                found[member] = out[at]
        compiled = self.compile_seconds - before
        seconds = time.perf_counter() - began - compiled
        tokens = sum(len(row) for row in rows.ids)
        return np.stack(found), Work(tokens, rows.cut, tuple(sorted(buckets)), seconds, compiled)

    def tokenize(self, texts: Sequence[Any]) -> Rows:
        """Tokens of each text with what the tokenizer puts around it, cut to the encoder's length.

        Raises:
            QuikError: `texts` is no list of texts or pairs, or has none.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
            raise QuikError(f"a list of texts is expected, not {described(texts)}")
        if not texts:
            raise QuikError("there are no texts; give at least one")
        ids, types, cut = [], [], 0
        for text in texts:
            pair = isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)
            if not (isinstance(text, str) or pair):
                raise QuikError(f"a text, or a pair of two, is expected, not {described(text)}")
            parts = (text,) if isinstance(text, str) else tuple(text)
            row = self.tokenizer(*parts, return_token_type_ids=True, verbose=False)
            if len(row["input_ids"]) > self.length:
                cut += 1
                row = self.tokenizer(*parts, return_token_type_ids=True, truncation=True, max_length=self.length, verbose=False)
            ids.append(np.asarray(row["input_ids"], np.int32))
            types.append(np.asarray(row["token_type_ids"], np.int32))
        if any(not len(row) for row in ids):
            raise QuikError("a text is empty, and the tokenizer puts nothing around it; leave it out")
        return Rows(ids, types, cut)

    def _rows(self, texts: int) -> int:
        """Rows of a batch: all of few texts, rounded up to a power of two."""
        return min(self.batch_size, 1 << (texts - 1).bit_length())

    def _batches(self, rows: Rows) -> Iterator[tuple[list[int], int]]:
        """Texts that go through the model together, by number, and the length that they are padded to."""
        order = sorted(range(len(rows.ids)), key=lambda member: len(rows.ids[member]))
        size = self._rows(len(order))
        by_bucket: dict[int, list[int]] = {}
        for member in order:
            by_bucket.setdefault(bucket(len(rows.ids[member]), self.length), []).append(member)
        for width, members in by_bucket.items():
            for first in range(0, len(members), size):
                yield members[first : first + size], width

    def _program(self, head: Head, shape: tuple[int, ...]) -> Any:
        key = (head, *shape)
        if key not in self._programs:
            began = time.perf_counter()
            traced = jax.jit(functools.partial(encode_texts, self._layout, head, bool(self.config.token_types)))
            like = jax.ShapeDtypeStruct(shape, jnp.int32)
            lengths = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
            self._programs[key] = traced.lower(self._params, like, lengths, like).compile()
            self.compile_seconds += time.perf_counter() - began
        return self._programs[key]


def bucket(length: int, longest: int) -> int:
    """The length that a text is padded to.

    >>> bucket(3, 512), bucket(17, 512), bucket(200, 250)
    (16, 32, 250)
    """
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), longest)


def encode_texts(
    layout: Layout,
    head: Head,
    typed: bool,
    params: dict[str, Any],
    ids: Int32[Array, "batch length"],
    lengths: Int32[Array, " batch"],
    types: Int32[Array, "batch length"],
) -> Float[Array, "batch width"]:
    """Texts padded on the right through embeddings, blocks and `head`. Without `typed` the family has no token types."""
    rest = nnx.merge(layout.rest, params["rest"])
    offsets = jnp.arange(ids.shape[1], dtype=jnp.int32)
    positions = jnp.where(offsets < lengths[:, None], offsets, PADDING)
    hidden = rest.embed(ids, positions, types if typed else None).astype(layout.dtype)
    for i, run in enumerate(layout.runs):
        trees = params["runs"][str(i)]
        if layout.unrolled:
            for j in range(run.count):
                hidden = _ENCODE_BLOCK(run.graphdef, trees[str(j)], hidden, positions)
            continue

        def block(hidden: Array, layer: Array, run: stacked.Run = run, trees: Any = trees) -> tuple[Array, None]:
            return _encode_block(run.graphdef, of_layer(trees, layer), hidden, positions), None

        hidden, _ = jax.lax.scan(block, hidden, jnp.arange(run.count, dtype=jnp.int32))
    return head(rest, hidden, positions)


def _encode_block(graphdef: nnx.GraphDef[Any], tree: Any, hidden: Array, positions: Array) -> Array:
    return nnx.merge(graphdef, tree)(hidden, Positions(positions))[0]


# Unrolled, blocks that are alike are traced and lowered once.
_ENCODE_BLOCK = jax.jit(_encode_block, static_argnames=("graphdef",))
