"""Tables and charts of the failure analysis, from its rows."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quikjax.evaluation.rounding import PARTS
from quikjax.reports.charts import LineChart, Point
from quikjax.study.grid import Row
from quikjax.study.results import Table

Line = list[str]


def _number(value: float | None, digits: int = 4) -> str:
    """A figure; nothing where there is none, and few digits of what broke down."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def _median(rows: Sequence[Mapping[str, Any]], field: str) -> str:
    """The median of a field, as text; nothing where there are no rows or figures."""
    values = [row[field] for row in rows if row[field] is not None]
    return _number(statistics.median(values)) if values else ""


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if error is None or value is None else f"{_number(value)} ± {_number(error)}"


def _models(rows: Sequence[Row]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Results by model and part, in the order of the rows."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.parameters["model"], {})[row.parameters["quantized"]] = row.result
    return found


def _whole(parts: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The result of a model with all of its layers' parts quantized, or what there is."""
    return parts.get("both") or next(iter(parts.values()))


def table(rows: Sequence[Row]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """A line per cell: what it loses, and how large errors of hidden states are behind the first block and the last."""
    embeds = any("embedding_cosine" in row.result and "perplexity" not in row.result for row in rows)
    head = ["model", "quantized", "perplexity", "of the original", "ln of their ratio", "KL", "same most likely"]
    head += ["embedding cosine"] if embeds else []
    head += ["first block", "last block, forced", "last block, free"]
    lines = []
    for row in rows:
        found = row.result
        blocks = found["blocks"]
        agreement = found.get("top1_agreement")
        line = [
            row.parameters["model"],
            row.parameters["quantized"],
            _number(found.get("perplexity"), 2),
            _number(found.get("original_perplexity"), 2),
            _with_error(found.get("ln_ppl_ratio"), found.get("ln_ppl_ratio_stderr")),
            _with_error(found.get("kl"), found.get("kl_stderr")),
            "" if agreement is None else f"{agreement:.1%}",
        ]
        line += [_number(found.get("embedding_cosine"))] if embeds else []
        line += [_number(x) for x in (blocks[0]["hidden_free"], blocks[-1]["hidden_forced"], blocks[-1]["hidden_free"])]
        lines.append(line)
    return head, lines


def comparison(rows: Sequence[Row]) -> list[Table]:
    """A line per model, with what tells it from the others: the paper's questions side by side."""
    lines = []
    for name, parts in _models(rows).items():
        found = _whole(parts)
        blocks = found["blocks"]
        halves = (found.get(f"ln_ppl_ratio_{half}_half") or {} for half in ("first", "second"))
        lines.append(
            [
                name,
                found["family"],
                found["norms"],
                found["mask"],
                *(_loss(parts.get(part)) for part in ("weights", "activations")),
                *(_with_error(half.get("mean"), half.get("stderr")) for half in halves),
                _median(found["layers"], "rounding_by_token"),
                _median(blocks, "by_token_forced"),
                _number(blocks[-1]["by_token_free"]),
            ]
        )
    head = ["model", "family", "norms", "mask", "weights alone", "activations alone", "first half", "second half"]
    head += ["rounding", "a block alone", "all blocks"]
    title = (
        "Models beside each other. Weights and activations alone: ln of the perplexity ratio, or 1 - cosine of embeddings. First "
        "and second half of a window: ln of the ratio of its tokens, all parts quantized. Rounding of what a layer reads, by "
        "token, median of layers; hidden states behind a block alone (forced), median, and behind all of them, by token."
    )
    return [Table(title, head, lines)]


def _loss(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "ln_ppl_ratio" in found:
        return _number(found["ln_ppl_ratio"])
    return _number(1 - found["embedding_cosine"])


def further(rows: Sequence[Row]) -> list[Table]:
    """Perplexity by position, hidden states by position and by block, and layers by kind."""
    models = _models(rows)
    parts = [part for part in PARTS if any(part in found for found in models.values())]
    tables = [
        Table(
            "Perplexity by position in the window, PPL(t), of the original and with parts quantized; KL with all of them.",
            ["model", "tokens before", "tokens", "original", *parts, "KL"],
            list(_perplexities(models, parts)),
        ),
        Table(
            "Hidden states that leave the last block by position, free, by token.",
            ["model", "tokens before", *parts],
            list(_places(models, parts)),
        ),
        Table(
            "Hidden states that leave each block: forced, free.",
            ["model", "block", *(f"{part}, {how}" for part in parts for how in ("forced", "free"))],
            list(_blocks(models, parts)),
        ),
        Table(
            "Layers, all parts quantized: medians over the blocks, and the block where rounding is worst.",
            ["model", "layer", "weights", "rounding", "by token", "worst", "in block", "output, forced", "output, free"],
            [line for name, found in models.items() for line in _layers(name, _whole(found)["layers"])],
        ),
    ]
    return [table for table in tables if table.lines]


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _perplexities(models: Mapping[str, Mapping[str, Mapping[str, Any]]], parts: Sequence[str]) -> Iterable[Line]:
    for name, found in models.items():
        for index, row in enumerate(_whole(found).get("positions", ())):
            figures = [_number(found[part]["positions"][index]["perplexity"], 2) if part in found else "" for part in parts]
            original = _number(row["original_perplexity"], 2)
            yield [name, _range(row["first"], row["last"]), str(row["tokens"]), original, *figures, _number(row["kl"])]


def _places(models: Mapping[str, Mapping[str, Mapping[str, Any]]], parts: Sequence[str]) -> Iterable[Line]:
    for name, found in models.items():
        for index, (first, last) in enumerate(_whole(found)["places"]):
            errors = [_number(found[part]["blocks"][-1]["by_position_free"][index]) if part in found else "" for part in parts]
            yield [name, _range(first, last), *errors]


def _blocks(models: Mapping[str, Mapping[str, Mapping[str, Any]]], parts: Sequence[str]) -> Iterable[Line]:
    for name, found in models.items():
        for number in range(len(_whole(found)["blocks"])):
            blocks = [found[part]["blocks"][number] if part in found else {} for part in parts]
            figures = [_number(block.get(f"hidden_{how}")) for block in blocks for how in ("forced", "free")]
            yield [name, str(number), *figures]


def _layers(name: str, layers: Sequence[Mapping[str, Any]]) -> Iterable[Line]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["layer"], []).append(layer)
    for kind, members in kinds.items():
        worst = max(members, key=lambda layer: layer["rounding_by_token"] or 0.0)
        yield [
            name,
            kind,
            *(_median(members, field) for field in ("weights", "rounding", "rounding_by_token")),
            _number(worst["rounding_by_token"]),
            str(worst["block"]),
            *(_median(members, field) for field in ("output_forced", "output_free")),
        ]


def depth_chart(rows: Sequence[Row]) -> LineChart:
    """Errors of hidden states behind each block, free: of several models, or of one with each part quantized."""
    models = _models(rows)
    if len(models) > 1:
        series = {name: _by_block(_whole(parts), "by_token_free") for name, parts in models.items()}
    else:
        (parts,) = models.values()
        series = {part: _by_block(found, "by_token_free") for part, found in parts.items()}
    return _depth("Hidden states behind each block, free-running, by token", series)


def charts(rows: Sequence[Row]) -> dict[str, LineChart]:
    """Further charts by name: of all models what perplexity loses by position, and four of each model by itself."""
    models = _models(rows)
    made: dict[str, LineChart] = {}
    lost = {
        name: [
            Point(_middle(row["first"], row["last"]), math.log(row["perplexity"] / row["original_perplexity"]))
            for row in found["positions"]
            if row["perplexity"] and row["original_perplexity"]
        ]
        for name, found in ((name, _whole(parts)) for name, parts in models.items())
        if "positions" in found
    }
    if len(lost) > 1:
        made["positions"] = LineChart(
            title="What perplexity loses by position, all parts quantized",
            x="tokens before",
            y="ln(perplexity / original)",
            series=lost,
            log_x=True,
        )
    for name, parts in models.items():
        made |= {f"{kind}-{name}": chart for kind, chart in _of_one(name, parts).items()}
    return made


def _of_one(name: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, LineChart]:
    made = {}
    whole = _whole(parts)
    if whole.get("positions"):
        series = {"original": _perplexity_points(whole, "original_perplexity")}
        series |= {part: _perplexity_points(found, "perplexity") for part, found in parts.items()}
        made["perplexity"] = LineChart(
            title=f"{name}: perplexity by position, of the original and with parts quantized",
            x="tokens before",
            y="perplexity",
            series=series,
            log_x=True,
            log_y=True,
        )
    made["places"] = LineChart(
        title=f"{name}: hidden states that leave the last block, free-running, by token",
        x="place in the window",
        y="relative error",
        series={part: _by_place(found) for part, found in parts.items()},
        log_x=True,
        log_y=True,
    )
    made["blocks"] = _depth(
        f"{name}: hidden states behind each block, forced and free",
        {f"{part}, {how}": _by_block(found, f"hidden_{how}") for how in ("free", "forced") for part, found in parts.items()},
    )
    made["rounding"] = _depth(f"{name}: rounding of what layers read, by token", _by_group(whole["layers"], "rounding_by_token"))
    return made


def _depth(title: str, series: Mapping[str, Sequence[Point]]) -> LineChart:
    return LineChart(title=title, x="block", y="relative error", series=series, log_y=True)


def _middle(first: int, last: int) -> float:
    """Where a range of positions stands on a logarithmic axis."""
    return math.sqrt(first * last)


def _perplexity_points(found: Mapping[str, Any], field: str) -> list[Point]:
    return [Point(_middle(row["first"], row["last"]), row[field]) for row in found["positions"] if row[field] is not None]


def _by_place(found: Mapping[str, Any]) -> list[Point]:
    errors = found["blocks"][-1]["by_position_free"]
    return [Point(_middle(first + 1, last + 1), error) for (first, last), error in zip(found["places"], errors, strict=True)]


def _by_block(found: Mapping[str, Any], field: str) -> list[Point]:
    return [Point(number, block[field]) for number, block in enumerate(found["blocks"]) if block[field] is not None]


def _by_group(layers: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[Point]]:
    """A line per group of layers, which read one tensor."""
    groups: dict[str, dict[int, float]] = {}
    for layer in layers:
        groups.setdefault(layer["group"], {}).setdefault(layer["block"], layer[field])
    return {group: [Point(block, value) for block, value in points.items()] for group, points in groups.items()}
