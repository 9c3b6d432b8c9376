"""The page of an artifact: one HTML file that asks nothing of any server, and the same as JSON."""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from quikjax.checkpoint import Reader
from quikjax.checkpoint.atomic import write_text
from quikjax.errors import QuikError
from quikjax.files import user_path
from quikjax.reports.artifact import ArtifactReport, read_report
from quikjax.reports.charts import STYLE, BarChart, LineChart, Point, bar_chart, line_chart, range_chart
from quikjax.reports.codes import CodesUse, codes_use
from quikjax.reports.evaluations import EvaluationRecord, check_writable, read_evaluations
from quikjax.reports.reproduce import Reproduction, reproduction
from quikjax.reports.tables import with_clip

# Small pictures of activation ranges: this many blocks of each kind of input, evenly spread over the depth.
_PICTURED = 6


class Page(NamedTuple):
    """Everything that stands on an artifact's page."""

    report: ArtifactReport
    codes: list[CodesUse]
    outliers: dict[str, list[int]]
    evaluations: list[EvaluationRecord]
    reproduction: Reproduction | None

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            **self.report.as_json(),
            "codes": [{**dataclasses.asdict(use), "at_the_ends": use.at_the_ends, "entropy": use.entropy} for use in self.codes],
            "outlier_columns": self.outliers,
            "evaluations": [dataclasses.asdict(record) for record in self.evaluations],
            "reproduction": None if self.reproduction is None else dataclasses.asdict(self.reproduction),
        }


def json_beside(html: str | Path) -> Path:
    """Where a page's JSON goes: the same name, ending in `.json`.

    Raises:
        QuikError: that is the page itself.
    """
    path = user_path(html)
    beside = path.with_suffix(".json")
    if beside == path:
        raise QuikError(f"{path} is where the page's JSON goes; give the page another ending, such as .html")
    return beside


def check_page(html: str | Path) -> None:
    """See that a page and its JSON can be written, before anything is read.

    Raises:
        QuikError: they cannot.
    """
    check_writable(html)
    check_writable(json_beside(html))


def read_page(artifact: str | Path) -> Page:
    """Read everything that an artifact and what is recorded beside it say; every weight is read once.

    Raises:
        QuikError: there is no artifact, or it is damaged.
    """
    report = read_report(artifact)
    reader = Reader(report.path)
    codes, outliers = codes_use(reader)
    return Page(report, codes, outliers, read_evaluations(report.path, report.fingerprint), reproduction(reader))


def write_page(page: Page, html: str | Path) -> None:
    """Write the page and, beside it, its JSON.

    Raises:
        QuikError: they cannot be written.
    """
    try:
        write_text(user_path(html), render(page))
        write_text(json_beside(html), json.dumps(page.as_json(), allow_nan=False, indent=1) + "\n")
    except OSError as error:
        raise QuikError(f"cannot write {html}: {error.strerror}") from None


def render(page: Page) -> str:
    """The page as HTML."""
    loader = jinja2.PackageLoader("quikjax.reports", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"bytes": _bytes, "error": _error, "decibels": _decibels, "facts": _facts, "with_clip": with_clip}
    report = page.report
    perplexities = [record for record in page.evaluations if record.kind == "perplexity"]
    by_layer = next((record.result["by_layer"] for record in reversed(perplexities) if "by_layer" in record.result), None)
    return environment.get_template("page.html").render(
        report=report,
        page=page,
        chart_style=STYLE,
        title=Path(report.path).name,
        perplexities=perplexities,
        tasks=[record for record in page.evaluations if record.kind == "tasks"],
        depth=_depth_chart(report.rows),
        codes=[(use, _codes_chart(use)) for use in page.codes],
        positions=[_positions_chart(record) for record in perplexities],
        by_layer=by_layer,
        layer_charts=[] if by_layer is None else _layer_charts(by_layer),
        ranges=[] if by_layer is None else _range_charts(by_layer.get("ranges", []), page.outliers),
        recipe=json.dumps(report.recipe, indent=1),
    )


_BLOCK = re.compile(r"\.(\d+)\.")


def block_and_kind(path: str) -> tuple[int, str]:
    """The number of a layer's block, and its name within it.

    >>> block_and_kind("model.layers.3.mlp.up_proj.weight")
    (3, 'mlp.up_proj')
    """
    found = _BLOCK.search(path)
    if found is None:
        return 0, path
    return int(found[1]), path[found.end() :].removesuffix(".weight")


def _by_kind(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[Point]]:
    series: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        block, kind = block_and_kind(str(row["path"]))
        value = row.get(field)
        if value is not None and math.isfinite(value):
            series[kind.rpartition(".")[2]].append(Point(block, float(value)))
    return dict(series)


def _depth_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    chart = LineChart(
        title="Relative error of each layer's output on calibration rows",
        x="block",
        y="relative error",
        series=_by_kind(rows, "relative_error"),
    )
    return line_chart(chart) if rows else ""


def _codes_chart(use: CodesUse) -> str:
    total = max(1, sum(use.counts))
    if use.bits > 4:  # 256 bars are bands of 8 codes
        values = [sum(use.counts[at : at + 8]) / total for at in range(0, len(use.counts), 8)]
        names = [f"{at + use.lowest}..{at + use.lowest + 7}" for at in range(0, len(use.counts), 8)]
    else:
        values = [count / total for count in use.counts]
        names = [str(index + use.lowest) for index in range(len(use.counts))]
    return bar_chart(BarChart(title=f"Codes of {use.pattern}", x="code", y="share of weights", names=names, values=values))


def _positions_chart(record: EvaluationRecord) -> str:
    rows = record.result.get("positions", [])
    series = {"quantized": [Point(row["first"], row["perplexity"], row.get("stderr")) for row in rows]}
    if any("original_perplexity" in row for row in rows):
        series["original"] = [Point(row["first"], row["original_perplexity"]) for row in rows]
    chart = LineChart(
        title="Perplexity by position in the window", x="tokens before", y="perplexity", series=series, log_x=True, log_y=True
    )
    return line_chart(chart) if rows else ""


def _layer_charts(by_layer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Captions and charts of errors by depth."""
    layers, blocks = by_layer["layers"], by_layer["blocks"]
    charts = [
        ("Output, teacher-forced: the layer reads what it reads in the original.", _by_kind(layers, "output_forced")),
        ("Output, free-running: it reads what the quantized model has made so far.", _by_kind(layers, "output_free")),
        ("Weights.", _by_kind(layers, "weights")),
        ("Activations, by rounding them.", _by_kind(layers, "rounding")),
        (
            "Hidden states that leave each block.",
            {
                "teacher-forced": [Point(block_and_kind(f"{row['path']}.")[0], row["hidden_forced"]) for row in blocks],
                "free-running": [Point(block_and_kind(f"{row['path']}.")[0], row["hidden_free"]) for row in blocks],
            },
        ),
    ]
    return [
        (caption, line_chart(LineChart(title=caption, x="block", y="relative error", series=series)))
        for caption, series in charts
        if series
    ]


def _range_charts(
    ranges: Sequence[Mapping[str, Any]], outliers: Mapping[str, list[int]]
) -> list[tuple[str, list[tuple[int, str]]]]:
    """By kind of input: a few blocks, each with its column ranges and the outlier columns among them."""
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for read in ranges:
        block, _ = block_and_kind(read["layers"][0])
        kind = ", ".join(block_and_kind(layer)[1] for layer in read["layers"])
        marked = outliers.get(read["layers"][0], [])
        kinds[kind].append((block, range_chart(f"block {block}: {kind}", read["absmax"], marked)))
    return [(kind, charts[:: max(1, math.ceil(len(charts) / _PICTURED))]) for kind, charts in kinds.items()]


def _bytes(count: int | float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _error(value: int | float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _decibels(value: int | float | None) -> str:
    return "?" if value is None else ("exact" if value == 0 else f"{-20 * math.log10(value):.1f}")


def _facts(value: Any) -> str:
    """A value of a provenance in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_facts(entry)}" for name, entry in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)
