"""The page of a scaling study: what it found, its charts and its table, in one HTML file that loads nothing."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from quikjax.checkpoint import atomic
from quikjax.errors import resumable
from quikjax.reports.charts import STYLE, line_chart
from quikjax.study.results import StudyResult
from quikjax.study.scaling import best_cells, charts, verdict
from quikjax.study.scaling_curves import Winner

PAGE, WINNERS, SECONDS = "page.html", "winners.json", "seconds.jsonl"

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:var(--chart-text);background:var(--chart-ground)}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:var(--chart-faint)}"
)


def write_page(result: StudyResult, directory: Path, *, comparable: bool) -> list[str]:
    """Write page, charts and winners beside a finished study's table; the names of the files.

    Raises:
        QuikError: the disk refuses.
    """
    found = verdict(result.rows) if comparable else []
    drawn = charts(result.rows, comparable=comparable)
    files = {f"{name}.svg": line_chart(chart, standalone=True) for name, chart in drawn.items()}
    files[WINNERS] = json.dumps([_as_json(winner) for winner in found], indent=1) + "\n"
    parts = [f"<p>{escape(result.title)}</p>", *(f"<p>{escape(note)}</p>" for note in result.notes)]
    parts += _listed("At a number of bits, over models", [sentence(winner) for winner in found])
    parts += _listed("At a precision, the best data type and block", best_cells(result.rows))
    parts += [f"<h2>{escape(chart.title)}</h2>{line_chart(chart)}" for chart in drawn.values()]
    parts.append(f"<h2>Cells</h2>{_html_table(result.head, result.lines)}")
    body = "\n".join(parts)
    files[PAGE] = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>k-bit scaling</title>'
        f"<style>{STYLE}{_STYLE}</style><h1>Which precision, at a number of model bits?</h1>\n{body}\n</html>\n"
    )
    with resumable(f"cannot write {directory}"):
        for name, text in files.items():
            atomic.write_text(directory / name, text)
    return list(files)


def _listed(title: str, sentences: Sequence[str]) -> list[str]:
    """A heading and a list, nothing where there are no sentences."""
    items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    return [f"<h2>{escape(title)}</h2><ul>{items}</ul>"] if sentences else []


def sentence(winner: Winner) -> str:
    """The result at one budget.

    >>> sentence(Winner(budget=8e6, precision="4 bit", losses={"4 bit": 1.0, "8 bit": 1.2}, wins={"4 bit": 0.97, "8 bit": 0.03}))
    'At 8 Mbit: 4 bit, perplexity 2.718, lowest in 97% of resamples of the text; then 8 bit, 3.320.'
    """
    ordered = sorted(winner.losses, key=lambda name: winner.losses[name])
    others = ", ".join(f"{name}, {math.exp(winner.losses[name]):.3f}" for name in ordered[1:])
    return (
        f"At {winner.budget / 1e6:.4g} Mbit: {winner.precision}, perplexity {math.exp(winner.losses[winner.precision]):.3f}, "
        f"lowest in {winner.wins[winner.precision]:.0%} of resamples of the text; then {others}."
    )


def _as_json(winner: Winner) -> dict[str, Any]:
    fields: Mapping[str, Any] = {
        "budget_bits": winner.budget,
        "precision": winner.precision,
        "losses": dict(winner.losses),
        "share_of_resamples": dict(winner.wins),
    }
    return dict(fields)


def _html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><tr>{first}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
