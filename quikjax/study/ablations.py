"""The paper's ablations on any model: each a grid of quantizations, measured against the original on one text.

A cell's parameters say what differs from QUIK-4B; `varied_recipe` turns them into a recipe. Figures of the paper (QUIK,
arXiv 2310.09259) stand beside ours, so that the same shape can be seen, or where it is another.
"""

import dataclasses
import functools
import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int32

from quikjax.errors import QuikError
from quikjax.evaluation import Reference, evaluate, reference, windows
from quikjax.loading import load_published, open_source
from quikjax.models.base import CausalLM
from quikjax.models.registry import dotted, pure_params
from quikjax.models.tokens import checked_model
from quikjax.quantizing.model import calibrate, quantize_model
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import AnyRule, Recipe, Rule, find_recipe
from quikjax.quantizing.smoothing import smooth_params
from quikjax.quantizing.weight_only import weight_only
from quikjax.reports.charts import LineChart, Point
from quikjax.study.grid import Cell, Row
from quikjax.study.results import Study
from quikjax.texts import calibration_text, calibration_windows, evaluation_text, tokenize
from quikjax.version import __version__
from quikjax.weights.quik import QuikWeight

Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The setting that all cells of an ablation share: the model, two texts, and how much of them."""

    model: str
    calibration: str
    evaluation: str
    samples: int = 16
    seqlen: int = 2048
    window: int = 2048
    windows: int = 3

    def command(self, name: str, index: int) -> str:
        """The command that computes one cell alone."""
        words = ["quikjax", "study", name, self.model, "--calibration", self.calibration, "--evaluation", self.evaluation]
        words += [f"--samples={self.samples}", f"--seqlen={self.seqlen}", f"--window={self.window}", f"--windows={self.windows}"]
        return shlex.join([*words, "--out", "DIR", "--cell", str(index)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """One question: its cells' parameters, what the paper found, and how to read the table.

    `paper` maps a cell's label to the paper's figure for it, named in `paper_column`. `x` names the parameter on the plot's axis.
    """

    title: str
    cells: Sequence[Parameters]
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paper_column: str = ""
    x: str | None = None
    log_x: bool = False
    notes: Sequence[str] = ()


_SMALL = "A small model has fewer columns to choose outliers from and less slack in every layer, so its losses are larger."

ABLATIONS: dict[str, Ablation] = {
    "outliers": Ablation(
        title="How many outlier columns? QUIK-4B, as a share of the hidden width; down_proj in proportion to its own.",
        cells=[{"outliers": share} for share in (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)],
        paper={"0.015625": "3.80", "0.03125": "3.74", "0.0625": "3.67", "0.125": "3.62"},
        paper_column="LLaMA-2-70B, paper",
        x="outliers",
        notes=(
            "Paper: 128, 256, 512, 1024 of 8192 columns on LLaMA-2-70B (FP16 3.20); without any, OPT goes to 9 000 - 15 000.",
            _SMALL,
        ),
    ),
    "down-proj": Ablation(
        title="How many bits for down_proj? The other layers W4A4 with outliers; the clip search off but in the last row.",
        cells=[
            *({"down_proj": bits, "clip": False} for bits in ("W4A4", "W4A16", "W4A8", "W8A8")),
            {"down_proj": "W8A8", "clip": True},
        ],
        paper={
            "W4A4, clip false": "8.78",
            "W4A16, clip false": "6.09",
            "W4A8, clip false": "6.11",
            "W8A8, clip false": "5.98",
            "W8A8, clip true": "5.84",
        },
        paper_column="LLaMA-2-7B, paper",
        notes=("Paper: LLaMA-2-7B, FP16 5.47. It is the bits of the activations that matter there.", _SMALL),
    ),
    "threshold": Ablation(
        title="Layers without outliers where the largest activation is at most T (2 T in 8-bit layers).",
        cells=[{"zero_threshold": threshold} for threshold in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)],
        x="zero_threshold",
        notes=("Bits per weight fall with T, as fewer columns are in 16 bits.",),
    ),
    "outlier-text": Ablation(
        title="Outliers, scales and Hessians from one text, judged on another.",
        cells=[{"calibration": text, "evaluation": judged} for text in ("given", "pydoc") for judged in ("given", "pydoc")],
        notes=(
            '"given" are the texts of --calibration and --evaluation. "in common" is the share of outlier columns that '
            "the row's "
            "calibration has in common with the first row's, over all layers.",
        ),
    ),
    "calibration-size": Ablation(
        title="How much calibration text? Sequences for outliers and Hessians.",
        cells=[{"samples": samples} for samples in (1, 2, 4, 8, 16, 32)],
        x="samples",
        log_x=True,
    ),
    "damping": Ablation(
        title="GPTQ's damping, relative to the mean of the Hessian's diagonal.",
        cells=[{"damping": damping} for damping in (0.001, 0.01, 0.1, 0.5)],
        x="damping",
        log_x=True,
        notes=("Paper: 0.01 for OPT and LLaMA, 0.5 for Falcon.",),
    ),
    "hessians": Ablation(
        title="Hessians through the blocks that are already quantized, or of the unquantized model.",
        cells=[{"sequential": True}, {"sequential": False}],
    ),
    "order": Ablation(
        title="The order in which GPTQ rounds columns: by falling diagonal of the Hessian, or as QUIK's code.",
        cells=[{"order": order} for order in ("hessian", "activation")],
    ),
    "methods": Ablation(
        title="QUIK and what is known: the same model, text and windows.",
        cells=[
            {"weights_only": "rtn-w4-g128"},
            {"weights_only": "awq-w4-g128"},
            {"recipe": "gptq-w4a16"},
            {"recipe": "rtn-w8a8"},
            {"recipe": "rtn-w8a8", "smooth": 0.8},
            {"recipe": "quik-8b"},
            {"recipe": "rtn-w4a4"},
            {"recipe": "rtn-w4a4", "smooth": 0.8},
            {"recipe": "quik-4b"},
        ],
        paper={"gptq-w4a16": "6.24", "rtn-w4a4, smooth 0.8": "83.12", "quik-4b": "5.84", "quik-8b": "5.48"},
        paper_column="LLaMA-2-7B, paper",
        notes=("Paper: LLaMA-2-7B, FP16 5.47; its SmoothQuant row is at W4A4. smooth is SmoothQuant's alpha.", _SMALL),
    ),
}

# Parameters that are fields of every rule.
_FIELDS = ("outliers", "clip", "zero_threshold", "damping", "order")


def varied_recipe(parameters: Parameters) -> Recipe:
    """QUIK-4B, or the recipe that `parameters` name, with the fields that they set in every rule.

    `down_proj` ("W4A8") sets the bits of the layers with a wide input: LLaMA's `down_proj`, GPT-2's
    `mlp.c_proj`, Falcon's `dense_4h_to_h`.

    >>> [rule.activation_bits for rule in varied_recipe({"down_proj": "W4A8"}).rules]
    [8, 4, 8, 4]
    """
    recipe = find_recipe(parameters.get("recipe", "quik-4b"))
    fields = {name: parameters[name] for name in _FIELDS if name in parameters}
    rules: list[AnyRule] = []
    for rule in recipe.rules:
        if not isinstance(rule, Rule):
            raise QuikError(f'recipe "{recipe.name}" has codebooks; quikjax study scaling is about those')
        own = dict(fields)
        if rule.scale_outliers and "down_proj" in parameters:
            weights, _, activations = parameters["down_proj"][1:].partition("A")
            own |= {"weight_bits": int(weights), "activation_bits": int(activations)}
        rules.append(Rule(**{**rule.model_dump(), **own}))
    return recipe.model_copy(update={"rules": tuple(rules)})


def ablation_study(name: str, setting: Setting, cell: int | None = None) -> Study:
    """Prepare an ablation: texts are read and cut, the model's headers too, but nothing is loaded.

    Args:
        name: one of `ABLATIONS`.
        cell: only the cell of this index.

    Raises:
        QuikError: a text or the model cannot be had, a text is too short, or there is no such cell.
    """
    ablation = ABLATIONS[name]
    bench = _Bench(setting)
    chosen = [Cell(dict(parameters), setting.command(name, index)) for index, parameters in enumerate(ablation.cells)]
    if cell is not None:
        if not 0 <= cell < len(chosen):
            raise QuikError(f"study {name} has cells 0 to {len(chosen) - 1}, not {cell}")
        chosen = [chosen[cell]]
    return Study(
        name=name,
        title=ablation.title,
        inputs=bench.inputs(chosen),
        cells=chosen,
        compute=bench.compute,
        table=functools.partial(_table, ablation),
        chart=functools.partial(_chart, ablation),
        notes=ablation.notes,
    )


class _Bench:
    """Model and texts, loaded when the first cell needs them, and the original's figures, computed once a text."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._source = open_source(setting.model)

    def inputs(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """All that figures depend on, read and checked."""
        setting = self.setting
        for cell in cells:
            self._calibration(cell.parameters)
            self._windows(cell.parameters)
        return {
            "model": self._source.fingerprint(),
            "calibration": _sha256(calibration_text(setting.calibration).content),
            "evaluation": _sha256(evaluation_text(setting.evaluation).content),
            **{name: getattr(setting, name) for name in ("samples", "seqlen", "window", "windows")},
            "quikjax": __version__,
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        }

    @functools.cached_property
    def _model(self) -> CausalLM:
        return checked_model(load_published(self.setting.model)[0])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._source.tokenizer()
        if tokenizer is None:
            raise QuikError(f"{self.setting.model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
        return tokenizer

    @functools.cache  # noqa: B019 (one bench lives as long as its study)
    def _tokens(self, name: str, judged: bool) -> Int32[np.ndarray, " tokens"]:
        text = evaluation_text(name) if judged else calibration_text(name)
        return tokenize(self._tokenizer, text.content)

    def _calibration(self, parameters: Parameters) -> Int32[np.ndarray, "samples length"]:
        name = parameters.get("calibration", "given")
        tokens = self._tokens(self.setting.calibration if name == "given" else name, False)
        return calibration_windows(tokens, parameters.get("samples", self.setting.samples), self.setting.seqlen)

    def _windows(self, parameters: Parameters) -> Int32[np.ndarray, "count length"]:
        name = parameters.get("evaluation", "given")
        tokens = self._tokens(self.setting.evaluation if name == "given" else name, True)
        return windows(tokens, self.setting.window, self.setting.windows)

    @functools.cache  # noqa: B019
    def _original(self, evaluation: str) -> Reference:
        return reference(self._model, self._windows({"evaluation": evaluation}))

    @functools.cache  # noqa: B019
    def _unquantized_statistics(self, samples: int) -> dict[str, Any]:
        graphdef, params = nnx.split(self._model)[0], pure_params(self._model)
        return calibrate(graphdef, params, [row[None] for row in self._calibration({"samples": samples})])

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Quantize as the cell's parameters say, and measure."""
        parameters, model = cell.parameters, self._model
        if "weights_only" in parameters:
            params, bits = weight_only(parameters["weights_only"], model, self._unquantized_statistics(self.setting.samples))
            return self._measured(parameters, params, bits)
        recipe = varied_recipe(parameters)
        if "smooth" in parameters:
            stats = self._unquantized_statistics(self.setting.samples)
            params = quantize_params(
                smooth_params(model, stats, parameters["smooth"]), recipe, hidden_size=model.config.hidden_size
            )
        elif parameters.get("sequential", True):
            batches = [row[None] for row in self._calibration(parameters)]
            params = quantize_model(model, recipe, batches)
        else:
            stats = self._unquantized_statistics(parameters.get("samples", self.setting.samples))
            params = quantize_params(pure_params(model), recipe, stats, hidden_size=model.config.hidden_size)
        packed = [leaf for leaf in dotted(params).values() if isinstance(leaf, QuikWeight)]
        bits = sum(leaf.bits() for leaf in packed) / sum(leaf.inputs * leaf.outputs for leaf in packed)
        return self._measured(parameters, params, bits)

    def _measured(self, parameters: Parameters, params: Any, bits: float) -> dict[str, Any]:
        """A cell's result: the quantized model against the original."""
        quantized = nnx.merge(nnx.split(self._model)[0], params)
        original = self._original(parameters.get("evaluation", "given"))
        found = evaluate(quantized, self._windows(parameters), original)
        distance = found.distance
        assert distance is not None  # the original was given
        result: dict[str, Any] = {
            "perplexity": found.perplexity,
            "stderr": found.stderr,
            "original_perplexity": distance.original_perplexity,
            "kl": distance.kl,
            "kl_stderr": distance.kl_stderr,
            "top1_agreement": distance.top1_agreement,
            "ln_ppl_ratio": distance.ln_ppl_ratio,
            "ln_ppl_ratio_stderr": distance.ln_ppl_ratio_stderr,
            "bits_per_weight": bits,
        }
        if "calibration" in parameters:
            result["outlier_columns"] = {
                path: np.sort(np.asarray(leaf.columns)[leaf.base :]).tolist()
                for path, leaf in dotted(params).items()
                if isinstance(leaf, QuikWeight)
            }
        return result


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _label(parameters: Parameters) -> str:
    """A cell's parameters, the name of the first left out: the table's head has it.

    >>> _label({"down_proj": "W4A4", "clip": False})
    'W4A4, clip false'
    """
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in parameters.values()]
    return ", ".join([texts[0], *(f"{name} {text}" for name, text in list(zip(parameters, texts, strict=True))[1:])])


def overlap(columns: Mapping[str, Sequence[int]], others: Mapping[str, Sequence[int]]) -> float:
    """The share of outlier columns that two quantizations have in common, over all layers.

    >>> overlap({"a": [1, 2], "b": [3, 4]}, {"a": [2, 1], "b": [4, 5]})
    0.75
    """
    total = sum(map(len, columns.values()))
    return sum(len(set(found) & set(others.get(path, ()))) for path, found in columns.items()) / total if total else 1.0


def _table(ablation: Ablation, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    first = rows[0]
    common: Callable[[Row], float] | None = None
    if "outlier_columns" in first.result:
        common = lambda row: overlap(row.result["outlier_columns"], first.result["outlier_columns"])  # noqa: E731
    names = dict.fromkeys(next(iter(row.parameters)) for row in rows)
    head = [" / ".join(names), "perplexity", "KL", "top-1", "ln(ppl/original)", "bits/weight"]
    head += ["in common"] if common is not None else []
    head += [ablation.paper_column] if ablation.paper else []
    lines = []
    for row in rows:
        found, label = row.result, _label(row.parameters)
        line = [
            label,
            f"{found['perplexity']:.2f} ± {found['stderr']:.2f}",
            f"{found['kl']:.4f} ± {found['kl_stderr']:.4f}",
            f"{found['top1_agreement']:.1%}",
            f"{found['ln_ppl_ratio']:.4f} ± {found['ln_ppl_ratio_stderr']:.4f}",
            f"{found['bits_per_weight']:.2f}",
        ]
        line += [f"{common(row):.1%}"] if common is not None else []
        line += [ablation.paper.get(label, "")] if ablation.paper else []
        lines.append(line)
    original = ["original", f"{first.result['original_perplexity']:.2f}", "0", "100.0%", "0", "16.00"]
    return head, [*lines, original + [""] * (len(head) - len(original))]


def _chart(ablation: Ablation, rows: Sequence[Row]) -> LineChart | None:
    if ablation.x is None:
        return None
    x = ablation.x
    points = [Point(row.parameters[x], row.result["kl"], row.result["kl_stderr"]) for row in rows]
    return LineChart(
        title=ablation.title,
        x=x,
        y="KL to the original, nats per token",
        series={"QUIK-4B": points},
        log_x=ablation.log_x,
        log_y=True,
    )


def default_directory(name: str) -> Path:
    """Where a study goes if nobody says.

    >>> default_directory("outliers").as_posix()
    'studies/outliers'
    """
    return Path("studies") / name
