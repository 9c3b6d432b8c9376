"""`quikjax report`: what was done to a model, and how well; as text, as JSON, or as a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.cli.options import Artifact, Json, check_artifact
from quikjax.cli.printing import decibels, print_json, say, show, size, table, with_clip

if TYPE_CHECKING:
    from quikjax.reports.artifact import ArtifactReport


def report(
    artifact: Artifact,
    layers: Annotated[bool, typer.Option("--layers", help="One row per layer, not one per kind of layer.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to FILE.html and its JSON to FILE.json; reads every weight once.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was quantized and how well, what was not and why, and where it all came from."""
    check_artifact(artifact)
    if html is not None:
        from quikjax.reports.page import check_page, json_beside, read_page, write_page

        check_page(html)
        page = read_page(artifact)
        write_page(page, html)
        say(f"wrote {html} and {json_beside(html)}")
        if as_json:
            print_json(page.as_json())
        return
    from quikjax.reports.artifact import read_report

    found = read_report(artifact)
    if as_json:
        print_json(found.as_json())
    else:
        show(_report_text(found, layers))


def _report_text(report: "ArtifactReport", every_layer: bool) -> str:
    recipe = report.recipe or {}
    model_type = (report.config or {}).get("model_type", "parameters without a model")
    lines = [
        f"artifact     {report.path} ({model_type}, {report.parts} parts, unquantized weights in {report.dtype}, "
        f"{'with' if report.has_tokenizer else 'without'} tokenizer)",
        f"fingerprint  {report.fingerprint}",
        f"written by   {report.written_by}",
        f"recipe       {recipe.get('name', 'not recorded')}",
        *(f"{name:<12} {_provenance(value)}" for name, value in report.provenance.items()),
        "",
    ]
    if every_layer and report.rows:
        rows = [
            [
                row["path"].removesuffix(".weight"),
                f"{row['outputs']} x {row['inputs']}",
                with_clip(row["format"], row.get("level_clip")),
                row["method"],
                str(row["outliers"]),
                *_error_cells(report, row["relative_error"]),
                "" if row["damping"] is None else f"{row['damping']:g}",
            ]
            for row in report.rows
        ]
        lines += [table(("layer", "N x K", "format", "method", "outliers", "rel. error", "SNR", "damping"), rows), ""]
    elif report.layers:
        rows = [
            [
                kind.pattern.removesuffix(".weight"),
                str(kind.count),
                f"{kind.outputs} x {kind.inputs}",
                " ".join(with_clip(kind.format, clip) for clip in kind.level_clips),
                kind.method or "?",
                str(kind.outliers),
                size(kind.bytes),
                *_error_cells(report, kind.relative_error),
                *_error_cells(report, kind.worst_error)[:1],
                "" if kind.damping is None else f"{kind.damping:g}",
            ]
            for kind in report.layers
        ]
        head = ("layer", "count", "N x K", "format", "method", "outliers", "size", "rel. error", "SNR", "worst", "damping")
        lines += [table(head, rows)]
        worst = report.worst()
        if worst:
            named = ", ".join(
                f"{row['path'].removesuffix('.weight')} {_error_cells(report, row['relative_error'])[0]}" for row in worst
            )
            lines += [f"worst layers: {named}"]
        else:
            lines += ["the artifact has no report, so errors are not known"]
        lines += [""]
    dense = [
        [kind.pattern, str(kind.count), " x ".join(map(str, kind.shape)), kind.dtype, size(kind.bytes), kind.reason]
        for kind in report.dense
    ]
    sizes = report.sizes
    count = sum(kind.count for kind in report.layers)
    lines += [
        table(("not quantized", "count", "shape", "dtype", "size", "why"), dense),
        "",
        f"quantized    {count} layers; linear layers have {sizes.bits_per_weight:.2f} bits per weight, "
        f"{sizes.relative_to_fp16:.3f} of their size in FP16",
        f"all          {size(sizes.all_bits // 8)} for {sizes.all_parameters} parameters; {size(sizes.disk_bytes)} on disk",
        *(f"note         {note}" for note in report.notes),
    ]
    return "\n".join(lines)


def _error_cells(report: "ArtifactReport", error: float | None) -> list[str]:
    """Relative error and signal-to-noise."""
    if error is None:
        return ["?", "?"]
    return [f"{error:.4f}", decibels(report.snr_db(error), error)]


def _provenance(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_provenance(entry)}" for name, entry in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)
