"""From the benchmark's rows to ratios, a table of the targets, markdown and JSON, rewritten after every row."""

import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Rows, outputs, inputs; the ratio to bf16 to reach, the stretch, the best published (W4A16), the ceiling by prior reckoning.
OPS_TARGETS = [
    ((1, 16), 8192, 8192, 2.2, 2.5, "2.25x", "3.3x"),
    ((64,), 8192, 8192, 1.4, 1.6, "1.4x", ""),
    ((2048,), 8192, 8192, 1.4, 1.6, "below 1x", "1.7x"),
    ((2048,), 11008, 4096, 1.4, 1.6, "below 1x", "1.7x"),
    ((2048,), 4096, 4096, 1.25, 1.4, "below 1x", "1.55x"),
]
# Name of a row, what of it, to reach, the stretch. Sizes and memory are to be at most, everything else at least.
OTHER_TARGETS = [
    ("Identity 2048 x 4096", "share_of_copy_bandwidth", 0.7, None),
    ("Identity 2048 x 8192", "share_of_copy_bandwidth", 0.7, None),
    ("QUIK-4B prefill of 2048", "ratio", 1.3, None),
    ("QUIK-4B decode batch 1 context 128", "ratio", 2.0, 2.3),
    ("QUIK-4B decode batch 16 context 128", "ratio", 1.8, None),
    ("QUIK-4B decode batch 1 context 2048", "ratio", None, None),
    ("QUIK-4B decode batch 16 context 2048", "ratio", None, None),
    ("QUIK-4B parameters", "size", 0.38, None),
    ("QUIK-4B peak memory, batch 1, context 2048", "size", 0.45, None),
]


def size_name(rows: int, outputs: int, inputs: int) -> str:
    """How rows of the table name a layer's shape."""
    return f"{rows} x {outputs} x {inputs}"


def finish(rows: list[Row], bandwidth: float) -> list[Row]:
    """The rows with what is relative: medians of samples, `ratio` and `ceiling` to the row named `of`, `size` of its bytes.

    `ratio` is the other's time over this one's; `ceiling` the other's time over `ideal_milliseconds`, the least time that bytes
    and operations allow at this run's ceilings; `size` this one's bytes over the other's. Without the other there are none.
    `share_of_copy_bandwidth` is that of a row's `moved_bytes`, `bandwidth` the copy's bytes a second.
    """
    done = [dict(row) for row in rows]
    for row in done:
        if row.get("samples"):
            row["milliseconds"] = statistics.median(row["samples"])
        if "moved_bytes" in row and row.get("milliseconds") and bandwidth:
            row["share_of_copy_bandwidth"] = row["moved_bytes"] / (row["milliseconds"] * 1e-3) / bandwidth
        if "operations" in row and row.get("milliseconds"):
            row["teraops"] = row["operations"] / row["milliseconds"] / 1e9
    by_name = {row["name"]: row for row in done if "failed" not in row}
    for row in done:
        other = by_name.get(row.get("of", ""))
        if other is None or "failed" in row:
            continue
        if row.get("milliseconds") and other.get("milliseconds"):
            row["ratio"] = other["milliseconds"] / row["milliseconds"]
            if row.get("ideal_milliseconds"):
                row["ceiling"] = other["milliseconds"] / row["ideal_milliseconds"]
                row["of_ceiling"] = row["ratio"] / row["ceiling"]
        if row.get("bytes") and other.get("bytes"):
            row["size"] = row["bytes"] / other["bytes"]
    return done


def write(head: Row, rows: list[Row], out: Path, stem: str) -> Path:
    """Write `stem.md` and `stem.json` under `out`; returns the former. Replaced whole, so a killed run keeps the last."""
    out.mkdir(parents=True, exist_ok=True)
    done = finish(rows, head.get("bandwidth", 0.0))
    texts = {".json": json.dumps({**head, "rows": done}, indent=1) + "\n", ".md": _markdown(head, done)}
    for suffix, text in texts.items():
        partial = out / f"{stem}{suffix}.partial"
        partial.write_text(text)
        partial.replace(out / f"{stem}{suffix}")
    return out / f"{stem}.md"


def last_line(written: Path | None, rows: list[Row], wrong: list[str]) -> str:
    """The line that the benchmark prints last, as JSON."""
    return json.dumps({"written": str(written), "rows": len(rows), "wrong": wrong})


def _markdown(head: Row, rows: list[Row]) -> str:
    lines = [f"# {head['device']}" + (" (dry run: these times mean nothing)" if head["dry_run"] else ""), ""]
    lines += [f"`{head['command']}`", "", ", ".join(f"{name} {version}" for name, version in head["versions"].items()), ""]
    checks = [row for row in rows if row.get("section") == "correctness"]
    wrong = [row["name"] for row in checks if "failed" in row]
    lines += [
        f"Correctness: {len(checks) - len(wrong)} of {len(checks)} cases right." if checks else "Correctness: not checked.",
        "",
    ]
    if wrong:
        lines += ["**Not to be quoted while these are wrong:** " + "; ".join(wrong) + ".", ""]
    if not head["dry_run"]:
        lines += _targets(rows)
    lines += ["## Everything measured", ""]
    lines += ["| section | what | ms | ratio to bf16 | ceiling | of ceiling | other |", "|---|---|---|---|---|---|---|"]
    shown = {"section", "name", "milliseconds", "ratio", "ceiling", "of_ceiling", "samples", "of", "ideal_milliseconds", "failed"}
    for row in rows:
        other = [
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in shown and v is not None
        ]
        if "failed" in row:
            other.insert(0, "**" + str(row["failed"]).replace("|", "/") + "**")
        numbers = [_number(row, "milliseconds", ".4f"), _number(row, "ratio", ".2f"), _number(row, "ceiling", ".2f")]
        cells = [row["section"], row["name"], *numbers, _number(row, "of_ceiling", ".0%"), ", ".join(other)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(row: Row | None, key: str, form: str) -> str:
    return "" if row is None or row.get(key) is None else format(row[key], form)


def _targets(rows: list[Row]) -> list[str]:
    """Measured beside what was to be reached; empty cells are what this run did not measure."""
    by_name = {row["name"]: row for row in rows}
    lines = ["## Targets (W4A4, outliers 1/16, everything included; ratio to bf16 in the same run)", ""]
    lines += ["| what | reach | stretch | measured | ceiling | of ceiling | best published (W4A16) | reckoned ceiling | |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for counts, outputs, inputs, reach, stretch, published, reckoned in OPS_TARGETS:
        for count in counts:
            row = by_name.get(f"QUIK W4A4 {size_name(count, outputs, inputs)}")
            lines.append(_target(size_name(count, outputs, inputs), row, "ratio", reach, stretch, published, reckoned))
    lines += [_target(name, by_name.get(name), key, reach, stretch, "", "") for name, key, reach, stretch in OTHER_TARGETS]
    return [*lines, ""]


def _target(
    what: str, row: Row | None, key: str, reach: float | None, stretch: float | None, published: str, reckoned: str
) -> str:
    value = None if row is None else row.get(key)
    unit = "x" if key in ("ratio", "size") else ""
    verdict = ""
    if value is not None and reach is not None:
        better = value <= reach if key == "size" else value >= reach
        verdict = "reached" if better else "missed"
    cells = ["" if number is None else f"{number:g}{unit}" for number in (reach, stretch)]
    cells += ["" if value is None else f"{value:.2f}{unit}", _number(row, "ceiling", ".2f"), _number(row, "of_ceiling", ".0%")]
    return "| " + " | ".join([what, *cells, published, reckoned, verdict]) + " |"
