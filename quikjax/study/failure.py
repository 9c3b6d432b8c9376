"""Where a model fails at few bits: the failure analysis of the INT4 paper (Wu et al., arXiv 2301.12017) on any model.

A cell is one model with one part of its layers quantized (their weights, their activations, both), held against the original on
the same windows of text. Everything comes from one walk through both models, block after block (`evaluation.layers`).

    decoders                 perplexity by position, PPL(t) = exp(mean over windows of the loss at t), of the next token
    masked language models   the same of the tokens that are masked, a fixed 15 % of every window
    other encoders           the cosine of their embeddings, mean over the tokens
    all                      errors of hidden states by position and block, of layers and of what they read, forced and free

What tells models apart is read off them: the family, norms before or behind, a causal mask or none.
"""

import dataclasses
import hashlib
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float64, Int, Int32

from quikjax.checkpoint import read_manifest
from quikjax.checkpoint.load import load
from quikjax.errors import QuikError, did_you_mean
from quikjax.evaluation import windows
from quikjax.evaluation.distance import TokenDistances, exponential, standard_error, summarize, token_distances
from quikjax.evaluation.layers import Ends, ErrorsByDepth, errors_by_depth
from quikjax.evaluation.original import check_original
from quikjax.evaluation.perplexity import token_losses
from quikjax.evaluation.positions import by_position
from quikjax.evaluation.rounding import PARTS, Part, only
from quikjax.loading import load_published, open_source
from quikjax.loading.source import Source
from quikjax.models.base import CausalLM, Transformer
from quikjax.models.encoder import MASKED_LM, Encoder
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.quantizing.calibration import calibration_size, calibration_tokens
from quikjax.quantizing.model import quantize_model
from quikjax.quantizing.recipe import Recipe
from quikjax.study.failure_tables import charts, comparison, depth_chart, further, table
from quikjax.study.grid import Cell
from quikjax.study.results import Study
from quikjax.texts import Text, framed, tokenize
from quikjax.version import __version__

SHARE = 0.15  # of a window's tokens that a masked language model is asked for, as in its pretraining
LONGEST = 2048


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Text and lengths to calibrate on, for a recipe that wants data."""

    text: Text
    samples: int | None
    seqlen: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to study, opened and not loaded: its name in tables, what was given for it, and what it reads.

    `ids` are the windows as it reads them, `[count, length]`, and `right` the tokens before any was masked. `asked` are the
    places in each window whose tokens a masked language model is asked for; `None` for other models.
    """

    name: str
    given: str
    source: Source
    abstract: Transformer
    ids: Int32[np.ndarray, "count length"]
    right: Int32[np.ndarray, "count length"]
    asked: Int[np.ndarray, "count asked"] | None
    calibration: Int32[np.ndarray, "samples seqlen"] | None

    @property
    def traits(self) -> dict[str, str]:
        """The family, where the norms stand, and which tokens attention sees."""
        config = self.abstract.config
        return {
            "family": str(self.source.config["model_type"]),
            "norms": "before" if getattr(config, "norm_first", True) else "behind",
            "mask": "causal" if isinstance(self.abstract, CausalLM) else "none",
        }


def open_subjects(
    models: Sequence[str],
    text: Text,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    window: int | None,
    count: int,
) -> list[Subject]:
    """Open models by name and cut the text for each. No weight is read.

    `window` left out is the longest that all of them read, at most 2048 tokens. `calibration` is for a recipe that needs data.

    Raises:
        QuikError: two models have the same name; one reads one text and writes another, has no tokenizer, a shorter context than
            `window` or no layer that the recipe quantizes; a text is short.
    """
    opened: dict[str, tuple[str, Source, Transformer]] = {}
    for given in models:
        name = Path(str(given).rstrip("/")).name
        if name in opened:
            raise QuikError(f'two models are called "{name}"; rename one of their directories')
        source = open_source(given)
        opened[name] = str(given), source, abstract_model(source.config)
        _check(given, opened[name][2], recipe)
    if window is None:
        window = min(LONGEST, *(abstract.config.context_length for _, _, abstract in opened.values()))
    subjects = []
    for name, (given, source, abstract) in opened.items():
        if window > abstract.config.context_length:
            raise QuikError(f"--window {window} exceeds the context of {name}, {abstract.config.context_length} tokens")
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise QuikError(f"{given} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
        ids, right, asked = _windows(abstract, tokenizer, text, window, count)
        subjects.append(
            Subject(
                name=name,
                given=given,
                source=source,
                abstract=abstract,
                ids=ids,
                right=right,
                asked=asked,
                calibration=None if calibration is None else _calibration(abstract, tokenizer, calibration),
            )
        )
    return subjects


def _check(given: str, model: Transformer, recipe: Recipe) -> None:
    if not isinstance(model, CausalLM | Encoder):
        raise QuikError(
            f"{given} reads one text and writes another; this study compares models of one stack: give a decoder or an encoder"
        )
    if not any(model.block_of(path) and recipe.rule_for(path) for path in dotted(pure_params(model))):
        raise QuikError(f'recipe "{recipe.name}" quantizes no layer of {given}, so there is nothing to study; name another')


def _windows(
    model: Transformer, tokenizer: Any, text: Text, length: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Windows as the model reads them, as they were before any token was masked, and the places of those that were."""
    if isinstance(model, CausalLM):
        ids = windows(tokenize(tokenizer, text.content), length, count)
        return ids, ids, None
    found = framed(tokenizer, text.content)
    right = found.around(windows(found.inner, found.room(length), count))
    mask = getattr(tokenizer, "mask_token_id", None)
    if getattr(model.config, "head", None) != MASKED_LM or mask is None:
        return right, right, None
    # The first token has none before it, and positions are counted from 1 as a decoder's are.
    first, end = max(1, len(found.before)), length - len(found.behind)
    asked = masked_places(count, first, end)
    ids = right.copy()
    np.put_along_axis(ids, asked, np.int32(mask), axis=1)
    return ids, right, asked


def masked_places(count: int, first: int, end: int) -> Int[np.ndarray, "count asked"]:
    """The same share of every window's places from `first` to before `end`, at random, always the same, in rising order.

    >>> masked_places(2, 1, 21).tolist()
    [[11, 13, 16], [1, 2, 20]]
    """
    rng = np.random.default_rng(0)
    size = max(1, round(SHARE * (end - first)))
    return np.stack([np.sort(rng.choice(np.arange(first, end), size, replace=False)) for _ in range(count)])


def _calibration(model: Transformer, tokenizer: Any, given: Calibration) -> Int32[np.ndarray, "samples seqlen"]:
    samples, length = calibration_size(model, given.samples, given.seqlen)
    return calibration_tokens(model, tokenizer, given.text.content, samples, length)


def recipe_of(artifact: str) -> Recipe:
    """The recipe that an artifact says it was made by.

    Raises:
        QuikError: there is no artifact, or it has none: nothing in it is quantized.
    """
    recorded = read_manifest(artifact).recipe
    if not recorded or not recorded.get("rules"):
        raise QuikError(f"{artifact} was made by no recipe that quantizes, so there is nothing to study")
    return Recipe.model_validate(recorded)


def choose_parts(names: Sequence[str]) -> tuple[Part, ...]:
    """Parts by name, in their order.

    Raises:
        QuikError: one is none.
    """
    for name in names:
        if name not in PARTS:
            raise QuikError(f'there is no part "{name}" of a layer to quantize; {did_you_mean(name, PARTS)}')
    return tuple(part for part in PARTS if part in names)


def failure_study(
    subjects: Sequence[Subject],
    recipe: Recipe,
    text: Text,
    *,
    parts: Sequence[Part] = PARTS,
    artifact: str | None = None,
    command: str = "quikjax study failure",
) -> Study:
    """The study of some models, ready to run.

    Args:
        recipe: what each is quantized by; of an artifact, the one that it was made by.
        parts: of its layers, that are quantized.
        artifact: the quantized model of the one subject, in place of quantizing it.
        command: the words and options that all cells share.

    Raises:
        QuikError: the artifact was made from another model.
    """
    quantized: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if artifact is not None:
        (subject,) = subjects
        check_original(artifact, subject.given)
        quantized = {"artifact": read_manifest(artifact).fingerprint}
    cells = []
    for subject, part in itertools.product(subjects, parts):
        whole: dict[str, Any] = {
            "model": subject.name,
            "quantized": part,
            "source": subject.source.fingerprint()[:16],
            "tokens": _digest(np.concatenate([subject.ids, subject.right])),
        }
        if artifact is None and subject.calibration is not None:
            whole["calibration"] = _digest(subject.calibration)
        cells.append(Cell(whole, f"{command} --out DIR --parts {part} {shlex.quote(subject.given)}"))
    count, length = subjects[0].ids.shape
    return Study(
        name="failure",
        title=f"Where {_by(recipe, artifact)} fails: {count} windows of {length} tokens of {text.origin}.",
        inputs={
            **quantized,
            "quikjax": __version__,
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        },
        cells=cells,
        compute=_Compute(subjects, recipe, artifact),
        table=table,
        chart=depth_chart,
        notes=NOTES,
        further=lambda rows: [*comparison(rows), *further(rows)],
        charts=charts,
    )


NOTES = (
    "Errors are relative, ||original - quantized|| / ||original||. Forced, a block reads what it reads in the original; free, "
    "what the quantized model has made so far. By token: of each token by itself, the mean of them.",
    "Quantized weights: activations exact; quantized activations: weights exact. Norms stand before attention and MLP, or behind "
    "their sums. Perplexity is of the next token; without a causal mask, of masked ones.",
)


def _by(recipe: Recipe, artifact: str | None) -> str:
    return f"recipe {recipe.name}" if artifact is None else Path(artifact).name


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(repr(ids.shape).encode() + np.ascontiguousarray(ids, "<i4").tobytes()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model and its quantized form: the structure, and the parameters of either by path."""

    name: str
    original: Transformer
    dense: Mapping[str, Any]
    packed: Mapping[str, Any]


class _Compute:
    """Compute a cell. Keeps the model that the last cell was of."""

    def __init__(self, subjects: Sequence[Subject], recipe: Recipe, artifact: str | None) -> None:
        self._subjects = {subject.name: subject for subject in subjects}
        self._recipe, self._artifact = recipe, artifact
        self._loaded: _Loaded | None = None

    def __call__(self, cell: Cell) -> dict[str, Any]:
        subject = self._subjects[cell.parameters["model"]]
        loaded = self._load(subject)
        params = only(cell.parameters["quantized"], loaded.packed, loaded.dense)
        model = nnx.merge(nnx.split(loaded.original)[0], nested(params))
        return measure(subject, loaded.original, model)

    def _load(self, subject: Subject) -> _Loaded:
        if self._loaded is None or self._loaded.name != subject.name:
            self._loaded = None  # before the next model is read
            original = load_published(subject.given)[0]
            dense = dotted(pure_params(original))
            if self._artifact is not None:
                packed = dotted(pure_params(load(self._artifact)[0]))
            else:
                batches = [] if subject.calibration is None else [row[None] for row in subject.calibration]
                packed = dotted(quantize_model(original, self._recipe, batches))
            self._loaded = _Loaded(subject.name, original, dense, packed)
        return self._loaded


def measure(subject: Subject, original: Transformer, quantized: Transformer) -> dict[str, Any]:
    """All figures of one model and a quantized form of it, as JSON."""
    depth = errors_by_depth(quantized, original, subject.ids)
    result: dict[str, Any] = dict(subject.traits)
    if isinstance(original, CausalLM) or subject.asked is not None:
        result |= _predictions(subject, original, quantized, depth.ends)
    if isinstance(original, Encoder):
        result["embedding_cosine"] = _embedding_cosine(depth.ends)
    return result | _by_depth(depth, original)


def _predictions(subject: Subject, original: Transformer, quantized: Transformer, ends: Ends) -> dict[str, Any]:
    """Perplexity of both, by position as well, and how far their predictions are apart."""
    graphdefs = [nnx.split(model)[0] for model in (quantized, original)]
    params = [pure_params(model) for model in (quantized, original)]
    losses, distances, positions = [], [], []
    for index, (theirs, mine) in enumerate(zip(ends.original, ends.quantized, strict=True)):
        length = subject.ids.shape[1]
        if subject.asked is None:
            from_, to = np.arange(length - 1), np.arange(1, length)
        else:
            from_ = to = subject.asked[index]
        targets = jnp.asarray(subject.right[index, to])
        hidden, other = jnp.asarray(mine[0, from_]), jnp.asarray(theirs[0, from_])
        losses.append(np.asarray(token_losses(graphdefs[0], params[0], hidden, targets), np.float64))
        found = token_distances(graphdefs[0], params[0], hidden, graphdefs[1], params[1], other, targets)
        distances.append(TokenDistances(*(np.asarray(values, np.float64) for values in found)))
        positions.append(to)
    loss, position = np.concatenate(losses), np.concatenate(positions)
    joined = TokenDistances(*(np.concatenate(values) for values in zip(*distances, strict=True)))
    if not (np.isfinite(loss).all() and np.isfinite(joined.original_loss).all()):
        raise QuikError(f"the logits of {subject.name} are not finite; a weight or an activation overflowed")
    distance = summarize(loss, joined)
    half = subject.ids.shape[1] // 2
    gap = loss - joined.original_loss
    return {
        "perplexity": exponential(float(loss.mean())),
        "original_perplexity": distance.original_perplexity,
        "ln_ppl_ratio": distance.ln_ppl_ratio,
        "ln_ppl_ratio_stderr": distance.ln_ppl_ratio_stderr,
        "kl": distance.kl,
        "kl_stderr": distance.kl_stderr,
        "top1_agreement": distance.top1_agreement,
        # Of the tokens in either half of the window: does it fail more, the more it has read?
        "ln_ppl_ratio_first_half": _mean(gap[position < half]),
        "ln_ppl_ratio_second_half": _mean(gap[position >= half]),
        "positions": [
            {**row.as_json(), "kl": float(joined.kl[(position >= row.first) & (position <= row.last)].mean())}
            for row in by_position(loss, position, joined.original_loss)
        ],
    }


def _mean(values: Float64[np.ndarray, " tokens"]) -> dict[str, float]:
    """A mean and its standard error; NaN where there are too few values."""
    return {"mean": float(values.mean()) if values.size else math.nan, "stderr": standard_error(values)}


def _embedding_cosine(ends: Ends) -> float:
    """The cosine of the two models' embeddings of a window, the mean over its tokens; the mean over windows."""
    cosines = []
    for pair in zip(ends.original, ends.quantized, strict=True):
        a, b = (hidden[0].astype(np.float64).mean(axis=0) for hidden in pair)
        cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return float(np.mean(cosines))


def position_edges(length: int) -> list[tuple[int, int]]:
    """Ranges of positions that are reported together, 0, 1, 2-3, 4-7, ...: first and last of each.

    >>> position_edges(6)
    [(0, 0), (1, 1), (2, 3), (4, 5)]
    """
    starts = [0, *(2**power for power in range(length.bit_length()) if 2**power < length)]
    return [(first, (starts[index + 1] if index + 1 < len(starts) else length) - 1) for index, first in enumerate(starts)]


def _by_depth(depth: ErrorsByDepth, model: Transformer) -> dict[str, Any]:
    """Hidden states block by block, by position too, and layers with the number of their block and the group that they are in."""
    places = {
        f"{'.'.join((*model.block_path, key))}.{layer}.weight": {"block": number, "group": group, "layer": layer}
        for number, (key, block) in enumerate(model.blocks.items())
        for group, layers in block.groups.items()
        for layer in layers
    }
    edges = position_edges(depth.tokens[0].free.shape[1])

    def over(errors: Float64[np.ndarray, "windows length"]) -> list[float]:
        return [float(errors[:, first : last + 1].mean()) for first, last in edges]

    blocks = [
        {
            **dataclasses.asdict(block),
            "by_token_forced": float(tokens.forced.mean()),
            "by_token_free": float(tokens.free.mean()),
            "by_position_forced": over(tokens.forced),
            "by_position_free": over(tokens.free),
        }
        for block, tokens in zip(depth.blocks, depth.tokens, strict=True)
    ]
    return {
        "places": [list(edge) for edge in edges],
        "blocks": blocks,
        "layers": [{**places[layer.path], **dataclasses.asdict(layer)} for layer in depth.layers],
    }
