"""k-bit scaling laws: with a fixed number of model bits, which precision is best (Dettmers & Zettlemoyer, arXiv 2212.09720)?

A cell is one model written in one data type, block and share of proxy outliers. Every linear layer of the blocks is quantized,
without data, and everything else stays in 16 bits; *all* bits are counted. Perplexity is that of the dequantized weights, in
float32, on the same windows of text for all cells.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from quikjax.algorithms.codebooks import MAX_BITS, MIN_BITS
from quikjax.errors import QuikError, did_you_mean
from quikjax.evaluation import evaluate, windows
from quikjax.loading import load_params, open_source
from quikjax.loading.source import Source
from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_model
from quikjax.quantizing.recipe import Recipe, codebook_recipe
from quikjax.reports.charts import LineChart, Point
from quikjax.study.grid import Cell, Row
from quikjax.study.results import Study
from quikjax.study.scaling_cells import Writer, Written
from quikjax.study.scaling_curves import Measured, Winner, budgets, pearson, winners
from quikjax.texts import Text, tokenize, tokens_fingerprint
from quikjax.version import __version__

# The mean accuracy of a model with its tokenizer on zero-shot tasks.
ZeroShot = Callable[[CausalLM, Any], float]

TYPES = ("int", "float", "quantile", "dynamic", "nf")
FLOAT = 16  # the precision that is not quantized


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of the family: its name in tables, what was given for it, what opens it, and its tokens of the text."""

    name: str
    given: str
    source: Source
    abstract: CausalLM
    ids: Int32[np.ndarray, "count length"]
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(leaf.size for leaf in dotted(pure_params(self.abstract)).values())

    @property
    def outside(self) -> int:
        """How many of them are in no block: embeddings, head, last norm. They stay in 16 bits."""
        prefix = ".".join(self.abstract.block_path) + "."
        return sum(leaf.size for path, leaf in dotted(pure_params(self.abstract)).items() if not path.startswith(prefix))


@dataclasses.dataclass(frozen=True)
class Family:
    """Models to compare, and what is to be said of them first."""

    members: tuple[Member, ...]
    warnings: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        """Whether all read the same tokens, so that losses per token can be compared."""
        return len({member.ids.tobytes() for member in self.members}) == 1


def open_family(models: Sequence[str], text: Text, *, window: int, count: int | None) -> Family:
    """Open models by name and tokenize the text for each. No weight is read.

    Raises:
        QuikError: two models have the same name, one has no tokenizer or a shorter context than `window`, or the text is short.
    """
    members: list[Member] = []
    warnings: list[str] = []
    tokenizers: dict[str, str] = {}
    for model in models:
        source = open_source(model)
        name = Path(str(model).rstrip("/")).name
        if any(member.name == name for member in members):
            raise QuikError(f'two models are called "{name}"; rename one of their directories')
        abstract = checked_model(abstract_model(source.config))
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
        if window > abstract.config.context_length:
            raise QuikError(f"--window {window} exceeds the context of {name}, {abstract.config.context_length} tokens")
        tokens = tokenize(tokenizer, text.content)
        member = Member(name, str(model), source, abstract, windows(tokens, window, count), tokenizer)
        members.append(member)
        tokenizers[name] = tokens_fingerprint(tokens)
        share = member.outside / member.parameters
        if share > 0.5:
            warnings.append(
                f"{share:.0%} of the parameters of {name} are embeddings and head, which stay in 16 bits: its curve is about them"
            )
    if len(set(tokenizers.values())) > 1:
        groups: dict[str, list[str]] = {}
        for name, tokens_of in tokenizers.items():
            groups.setdefault(tokens_of, []).append(name)
        parts = "; ".join(", ".join(names) for names in groups.values())
        warnings.append(
            f"the models have different tokenizers ({parts}): their perplexities are per token of their own and are not compared"
        )
    return Family(tuple(members), tuple(warnings))


def grid(
    family: Family,
    *,
    bits: Sequence[int],
    types: Sequence[str],
    blocks: Sequence[int | str],
    proxies: Sequence[float],
    exponent_bits: int | None = None,
    command: str = "",
) -> list[Cell]:
    """The cells, model by model: each data type at each precision, block and share of proxy outliers, and the model in 16 bits.

    Raises:
        QuikError: a precision, a data type, a block or a share is none.
    """
    for k in bits:
        if k != FLOAT and not MIN_BITS <= k <= MAX_BITS:
            raise QuikError(f"--bits takes numbers from {MIN_BITS} to {MAX_BITS}, and {FLOAT}; not {k}")
    for name in types:
        if name not in TYPES:
            raise QuikError(f'there is no data type "{name}" for a study; {did_you_mean(name, TYPES)}')
    for share in proxies:
        if not 0 <= share <= 1:
            raise QuikError(f"--proxy takes shares between 0 and 1, not {share:g}")
    cells = []
    for member in family.members:
        whole = {"model": member.name, "source": member.source.fingerprint()[:16]}
        for k in bits:
            if k == FLOAT:
                cells.append(Cell({**whole, "bits": k}, f"{command} --models {member.given} --bits {k}".strip()))
                continue
            for name, block, share in itertools.product(types, blocks, proxies):
                fields = {"type": name, "bits": k, "block": block, "proxy": share}
                if name == "float" and exponent_bits is not None:
                    fields["exponent_bits"] = min(exponent_bits, k - 1)
                alone = f"--models {member.given} --bits {k} --types {name} --blocks {block} --proxy {share:g}"
                cells.append(Cell({**whole, **fields}, f"{command} {alone}".strip()))
    if not cells:
        raise QuikError("the grid has no cells; give at least one model and one precision")
    return cells


def short_blocks(family: Family, cells: Sequence[Cell]) -> list[str]:
    """Which blocks do not divide the layers of which models, a sentence each."""
    found = []
    blocks = list(dict.fromkeys(cell.parameters.get("block") for cell in cells))
    for member in family.members:
        prefix = ".".join(member.abstract.block_path) + "."
        sizes = {
            leaf.size for path, leaf in dotted(pure_params(member.abstract)).items() if path.startswith(prefix) and leaf.ndim > 1
        }
        for block in blocks:
            if isinstance(block, int) and any(size % block for size in sizes):
                found.append(
                    f"blocks of {block} do not divide the weights of every layer of {member.name}: the last one is short"
                )
    return found


def recipe_of(parameters: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a cell, `None` in 16 bits."""
    if parameters["bits"] == FLOAT:
        return None
    fields = {"block": parameters["block"], "proxy": parameters["proxy"]}
    if "exponent_bits" in parameters:
        fields["exponent_bits"] = parameters["exponent_bits"]
    return codebook_recipe(parameters["type"], parameters["bits"], **fields)


class Compute:
    """Compute a cell: bits counted, and perplexity. Keeps the parameters of the model that the last cell was of."""

    def __init__(self, family: Family, zero_shot: ZeroShot | None = None) -> None:
        self._zero_shot = zero_shot
        self._members = {member.name: member for member in family.members}
        self._loaded: tuple[str, dict[str, Any], Writer] | None = None

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Bits in all and per quantized weight, loss of each window in nats per token, and their perplexity."""
        member = self._members[cell.parameters["model"]]
        recipe = recipe_of(cell.parameters)
        params, writer = self._load(member)
        written = Written(params, 0, 0) if recipe is None else writer(recipe)
        model = nnx.merge(nnx.split(member.abstract)[0], nested(written.params))
        losses: list[float] = []

        def note(done: int, _count: int, perplexity: float) -> None:
            # The mean so far, from which each window's own follows.
            losses.append(done * math.log(perplexity) - math.fsum(losses))

        found = evaluate(model, member.ids, batch=1, on_batch=note)
        tasks = {} if self._zero_shot is None else {"zero_shot": self._zero_shot(model, member.tokenizer)}
        return {
            **tasks,
            "total_bits": written.bits + FLOAT * (member.parameters - written.weights),
            "bits_per_weight": written.bits / written.weights if written.weights else float(FLOAT),
            "parameters": member.parameters,
            "perplexity": found.perplexity,
            "stderr": found.stderr,
            "window_losses": [round(loss, 7) for loss in losses],
        }

    def _load(self, member: Member) -> tuple[dict[str, Any], Writer]:
        """Dense parameters in float32, and what rewrites them."""
        if self._loaded is None or self._loaded[0] != member.name:
            self._loaded = None  # before the next model is read
            # In 16 bits first: that is the model that all precisions start from.
            loaded = dotted(load_params(member.source, member.abstract, dtype=jnp.float16))
            params = {path: leaf.astype(jnp.float32) for path, leaf in loaded.items()}
            self._loaded = (member.name, params, Writer(member.abstract, params))
        return self._loaded[1:]


def scaling_study(
    family: Family,
    cells: Sequence[Cell],
    text: Text,
    zero_shot: ZeroShot | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> Study:
    """The study of a family's cells, ready to run.

    Args:
        zero_shot: measures each cell on tasks too.
        tasks: what tells these tasks from others, as JSON.
    """
    used = {member.name: hashlib.sha256(member.ids.tobytes()).hexdigest()[:16] for member in family.members}
    # A cell depends on its own model's tokens alone: another model beside it must not undo its row.
    named = [Cell({**cell.parameters, "tokens": used[cell.parameters["model"]]}, cell.command) for cell in cells]
    shape = family.members[0].ids.shape
    return Study(
        name="scaling",
        title=f"Perplexity over model bits, {shape[0]} windows of {shape[1]} tokens of {text.origin}.",
        inputs={"quikjax": __version__, "window": shape[1], "windows": shape[0], **({"tasks": dict(tasks)} if tasks else {})},
        cells=named,
        compute=Compute(family, zero_shot),
        table=lambda rows: _table(rows, family.comparable),
        chart=lambda rows: charts(rows, comparable=family.comparable)["precisions"],
        notes=(*family.warnings, *short_blocks(family, cells)),
    )


def best_per_model(rows: Sequence[Row], **fixed: Any) -> dict[str, list[Measured]]:
    """For every precision its points, one per model: of the cells that agree with `fixed` the one with the lowest loss.

    The best of several is a little better than it should be; windows are the same for all, so the bias is shared.
    """
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if all(row.parameters.get(name, value) == value for name, value in fixed.items()):
            models = found.setdefault(f"{row.parameters['bits']} bit", {})
            best = models.get(row.parameters["model"])
            if best is None or row.result["perplexity"] < best.result["perplexity"]:
                models[row.parameters["model"]] = row
    order = sorted(found, key=lambda name: int(name.split()[0]))
    return {
        name: [Measured(row.result["total_bits"], tuple(row.result["window_losses"])) for row in found[name].values()]
        for name in order
    }


def verdict(rows: Sequence[Row]) -> list[Winner]:
    """The winning precision at budgets that several precisions reach, over all data types, blocks and proxies."""
    curves = best_per_model(rows)
    return winners(curves, budgets(curves))


def charts(rows: Sequence[Row], *, comparable: bool = True) -> dict[str, LineChart]:
    """Loss over all bits: a line per precision; and where there are several, per data type, block or share of proxy outliers.

    Those lines go through the models, at one number of bits a chart; where there is only one model, through the precisions.
    """
    made = {"precisions": _chart("Precisions", best_per_model(rows), lines=comparable)}
    alone = len({row.parameters["model"] for row in rows}) == 1
    whole = {f"{FLOAT} bits": row.result["perplexity"] for row in rows if row.parameters["bits"] == FLOAT}
    for name, key, what in (("types", "type", "data type"), ("blocks", "block", "block"), ("proxies", "proxy", "proxy outliers")):
        values = list(dict.fromkeys(row.parameters[key] for row in rows if key in row.parameters))
        if len(values) < 2:
            continue
        by_value = {_named(key, value): [row for row in rows if row.parameters.get(key) == value] for value in values}
        if alone:
            through = {
                label: [point for points in best_per_model(some).values() for point in points] for label, some in by_value.items()
            }
            made[name] = _chart(f"By {what}, the best of the rest at each precision", through, lines=True, rules=whole)
            continue
        for k in sorted({row.parameters["bits"] for row in rows} - {FLOAT}):
            lines = {
                label: points
                for label, some in by_value.items()
                for points in best_per_model([row for row in some if row.parameters["bits"] == k]).values()
            }
            made[f"{name}-{k}"] = _chart(f"{k} bits, by {what}", lines, lines=comparable)
    return made


def _named(key: str, value: Any) -> str:
    """A value in a chart's legend."""
    if key == "block":
        return "whole tensor" if value == "tensor" else f"block {value}"
    if key == "proxy":
        return f"{value:.1%} of the columns in 16 bits" if value else "no outliers"
    return str(value)


def best_cells(rows: Sequence[Row]) -> list[str]:
    """The best cell at each precision of every model, a sentence each."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row.parameters["model"], row.parameters["bits"])
        if key not in best or row.result["perplexity"] < best[key].result["perplexity"]:
            best[key] = row
    sentences = []
    for (model, bits), row in sorted(best.items(), key=lambda item: (item[1].result["parameters"], item[0])):
        sentence = f"{model}, {bits} bits: perplexity {_perplexity(row.result['perplexity'])}"
        if bits != FLOAT:
            p = row.parameters
            cut = "whole tensors" if p["block"] == "tensor" else f"blocks of {p['block']}"
            kept = f", {p['proxy']:.3g} of the columns in 16 bits" if p["proxy"] else ""
            sentence += f" with {p['type']} in {cut}{kept}, {row.result['bits_per_weight']:.3f} bits a weight"
        sentences.append(f"{sentence}, {row.result['total_bits'] / 1e6:.4g} Mbit in all.")
    return sentences


def _perplexity(value: float) -> str:
    """A perplexity, without the digits that mean nothing of a model that broke down."""
    return f"{value:.4f}" if value < 1000 else f"{value:.3g}"


def task_correlation(rows: Sequence[Row]) -> float | None:
    """Pearson of perplexity (capped at 100) and mean zero-shot accuracy, over the rows that have both."""
    pairs = [(min(row.result["perplexity"], 100.0), row.result["zero_shot"]) for row in rows if "zero_shot" in row.result]
    return pearson([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _chart(
    title: str, curves: Mapping[str, Sequence[Measured]], *, lines: bool, rules: Mapping[str, float] | None = None
) -> LineChart:
    def points(measured: Sequence[Measured]) -> list[Point]:
        ordered = sorted(measured, key=lambda point: point.bits)
        return [Point(point.bits / 1e6, min(math.exp(float(np.mean(point.losses))), 100.0)) for point in ordered]

    return LineChart(
        title=title,
        x="model bits, in millions",
        y="perplexity (100 at most)",
        series={name: points(measured) for name, measured in curves.items()},
        log_x=True,
        log_y=True,
        lines=lines,
        rules={name: min(level, 100.0) for name, level in (rules or {}).items()},
    )


def _table(rows: Sequence[Row], comparable: bool) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    head: tuple[str, ...] = ("model", "data type", "bits", "block", "proxy", "bits per weight", "Mbit in all", "perplexity", "±")
    lines: list[tuple[str, ...]] = [
        (
            str(row.parameters["model"]),
            str(row.parameters.get("type", "16 bit")),
            str(row.parameters["bits"]),
            str(row.parameters.get("block", "")),
            f"{row.parameters['proxy']:g}" if "proxy" in row.parameters else "",
            f"{row.result['bits_per_weight']:.3f}",
            f"{row.result['total_bits'] / 1e6:.3f}",
            _perplexity(row.result["perplexity"]),
            _perplexity(row.result["stderr"]) if row.result["stderr"] is not None else "",
        )
        for row in rows
    ]
    if any("zero_shot" in row.result for row in rows):
        head = (*head, "zero-shot")
        lines = [(*line, f"{row.result['zero_shot']:.4f}") for line, row in zip(lines, rows, strict=True)]
        correlation = task_correlation(rows)
        if correlation is not None:
            lines.append((*("Pearson of perplexity and zero-shot", *[""] * 8), f"{correlation:.3f}"))
    if comparable:
        for winner in verdict(rows):
            share = winner.wins[winner.precision]
            lines.append(
                (
                    *("at a budget", winner.precision, "", "", "", "", f"{winner.budget / 1e6:.3f}"),
                    *(f"{math.exp(winner.losses[winner.precision]):.4f}", f"best in {share:.0%} of resamples"),
                    *[""] * (len(head) - 9),
                )
            )
    return head, lines


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a grid: cells in all and those still to run, hours and bytes of disk, by estimate."""

    models: int
    cells: int
    missing: int
    hours: float
    bytes: int


def estimate(family: Family, cells: Sequence[Cell], done: Sequence[bool], *, flops: float = 3e10) -> Cost:
    """Hours and disk of the cells that are not done: two operations per weight and token at `flops` a second, and quantizing.

    Args:
        flops: what this machine sustains; the default is that of two ordinary cores.
    """
    members = {member.name: member for member in family.members}
    seconds = 0.0
    for cell, finished in zip(cells, done, strict=True):
        if not finished:
            member = members[cell.parameters["model"]]
            rate = 150e6 / 2 ** max(cell.parameters["bits"] - 4, 0) if cell.parameters["bits"] != FLOAT else math.inf
            seconds += 2 * member.parameters * member.ids.size / flops + member.parameters / rate + 1
    return Cost(len(members), len(cells), len(cells) - sum(done), seconds / 3600, 2000 * len(cells))
