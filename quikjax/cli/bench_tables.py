"""The figures of `quikjax bench` as rows, and the rows as text."""

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from quikjax.cli.printing import size, table

if TYPE_CHECKING:
    from quikjax.encoding.speed import ProductSpeed
    from quikjax.rounds import Speed

Row = dict[str, Any]


def speed_row(name: str, one: "Speed[Any]") -> Row:
    """The row of a model in a test."""
    return {
        "model": name,
        "batch": one.test.batch,
        "test": one.test.name,
        "mean": one.mean,
        "deviation": one.deviation,
        "samples": list(one.rounds),
        "compile_seconds": one.compile_seconds,
        "peak_bytes": one.peak_bytes or None,
    }


def bandwidth_fields(count: int, one: "Speed[Any]", rate: float) -> Row:
    """Bytes that decoding reads, against what the device could; only a test that does nothing else says something about it."""
    if one.test.prompt:
        return {"bytes_per_step": None, "share_of_bandwidth": None}
    return {"bytes_per_step": count, "share_of_bandwidth": count * one.mean / one.test.batch / rate}


def product_fields(products: "tuple[ProductSpeed, ...]") -> Row:
    """The fields of an encoder's row that say which products gain, and the pattern that leaves the others in floats."""
    from quikjax.encoding.speed import keep_pattern

    slower = [layer for one in products if not one.gains for layer in one.layers]
    listed = [
        {
            "layers": list(one.layers),
            "outputs": list(one.outputs),
            "inputs": one.inputs,
            "rows": one.rows,
            "quantized_us": one.quantized,
            "floats_us": one.floats,
            "faster": "quantized" if one.gains else "floats",
        }
        for one in products
    ]
    return {"products": listed, "keep": keep_pattern(slower) if slower else None}


def compared(rows: list[Row], against: str | None) -> list[Row]:
    """The rows, with `over_against`, how many times as fast as the model `against` in the same test, where there is one."""
    if against is None:
        return rows
    base = {(row["test"], row["batch"]): row["mean"] for row in rows if row["model"] == against}
    return [{**row, "over_against": row["mean"] / base[row["test"], row["batch"]]} for row in rows]


def written(rows: list[Row], output: str, against: str | None) -> str:
    """Rows in one of the forms of --output, its last newline left out. Products are in all but csv."""
    if output == "json":
        return json.dumps(rows, indent=2)
    if output == "jsonl":
        return "\n".join(json.dumps(row) for row in rows)
    if output == "csv":
        text = io.StringIO()
        fields = [field for field in rows[0] if field not in ("products", "keep")]
        writer = csv.DictWriter(text, fieldnames=fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "samples": " ".join(map(str, row["samples"]))} for row in rows)
        return text.getvalue().removesuffix("\n")
    head = ["model", "batch", "test", "tokens/s", "compiled in s", "memory"]
    head += ["of the bandwidth"] * ("share_of_bandwidth" in rows[0]) + [f"over {against}"] * ("over_against" in rows[0])
    return "\n".join([table(head, [_cells(row) for row in rows]), *_products(rows)])


def _cells(row: Row) -> list[str]:
    cells = [
        row["model"],
        str(row["batch"]),
        row["test"],
        f"{row['mean']:.2f} ± {row['deviation']:.2f}",
        f"{row['compile_seconds']:.2f}",
        "" if row["peak_bytes"] is None else size(row["peak_bytes"]),
    ]
    if "share_of_bandwidth" in row:
        cells.append("" if row["share_of_bandwidth"] is None else f"{row['share_of_bandwidth']:.0%}")
    return [*cells, *([f"{row['over_against']:.2f}x"] if "over_against" in row else [])]


def _products(rows: list[Row]) -> list[str]:
    """For each encoder with packed weights its products, by the number of rows, and how those that lose are left in floats."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows if row.get("products")):
        # Two tests may have the same number of rows.
        by_count = {row["products"][0]["rows"]: row for row in rows if row["model"] == model}
        by_count = dict(sorted(by_count.items()))
        cells = [
            [
                ", ".join(of_counts[0]["layers"]),
                f"{'+'.join(map(str, of_counts[0]['outputs']))} x {of_counts[0]['inputs']}",
                *(f"{one['quantized_us']:.1f} / {one['floats_us']:.1f} us: {one['faster']}" for one in of_counts),
            ]
            for of_counts in zip(*(row["products"] for row in by_count.values()), strict=True)
        ]
        lines += [
            "",
            table(("product of a block", "N x K", *(f"{count} rows" for count in by_count)), cells),
            f"{model}: as quantized / of its weights in floats, and the faster one, measured; rows are batch x length",
            *(f"at {count} rows {_advice(row)}" for count, row in by_count.items()),
        ]
    return lines


def _advice(row: Row) -> str:
    if row["keep"] is None:
        return "every product is faster as quantized"
    if all(one["faster"] == "floats" for one in row["products"]):
        return "every product is faster in floats: quantizing saves memory here, and no time"
    return f"some are faster in floats; to leave them there: quikjax quantize --keep '{row['keep']}'"
