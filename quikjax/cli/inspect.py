"""`quikjax plan` and `quikjax report`: what will be done to a model, and what was done. Neither reads a weight."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.errors import QuikError

if TYPE_CHECKING:
    from quikjax.pallas_kernels.choice import Choice
    from quikjax.planning import Plan
    from quikjax.reporting import ArtifactReport

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def plan(
    model: Annotated[str, typer.Argument(help="A model as `quantize` takes it, or just its config.json. No weight is fetched.")],
    recipe: Annotated[str, typer.Option(help="quik-4b, quik-8b, w4a8, rtn-w4a4, gptq-w4a16, fp, or a .json file.")] = "quik-4b",
    outliers: Annotated[str | None, typer.Option(help="Columns in FP16: a count, or a fraction such as 0.0625 or 1/16.")] = None,
    batch: Annotated[int, typer.Option(help="Texts at once when the result runs.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens in each; left out, 2048 or the model's context.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each; left out, 2048 or the model's context.")] = None,
    activation_memory: Annotated[
        float | None, typer.Option(help="As `quantize` takes it: GB of memory for activations; left out, a quarter of all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of all that is not quantized.")] = "float32",
    device: Annotated[str, typer.Option(help="here, cpu, h100, h200, a100 or l40s.")] = "here",
    memory: Annotated[float | None, typer.Option(help="GB (10^9 bytes) that one device holds; left out, the device's.")] = None,
    as_json: Json = False,
) -> None:
    """What quantizing a model will do, and what the result will take, before any weight is read.

    Everything that would go wrong is listed at once; the exit status is then 1.
    """
    from quikjax.cli.app import parse_activation_memory, parse_dtype, parse_outliers, print_json
    from quikjax.recipe import find_recipe

    chosen = find_recipe(recipe)
    if outliers is not None:
        chosen = chosen.with_outliers(parse_outliers(outliers))
    if memory is not None and memory <= 0:
        raise QuikError(f"--memory takes the GB of one device, not {memory:g}")
    activation_bytes = parse_activation_memory(activation_memory)
    floating = parse_dtype(dtype)

    from quikjax.planning import describe, find_device, make_plan

    there, held = find_device(device, None if memory is None else int(memory * 1e9))
    found = describe(model)
    made = make_plan(
        found.config,
        chosen,
        source=found.source,
        dtype=floating,
        batch=batch,
        length=length,
        samples=samples,
        seqlen=seqlen,
        activation_bytes=activation_bytes,
        device=there,
        memory_bytes=held,
    )
    if as_json:
        print_json({"model": model, **made.as_json()})
    else:
        print(_plan_text(model, made))
    if made.problems:
        count = len(made.problems)
        raise QuikError(f"this cannot be quantized so: {count} problem{'s' if count > 1 else ''}, listed with the plan")


def _plan_text(model: str, plan: "Plan") -> str:
    from quikjax.cli.show import table

    headers = "tensors as its configuration says" if plan.has_headers else "from its configuration alone"
    lines = [
        f"model        {model} ({plan.model_type}, {headers}), activations and unquantized weights in {plan.dtype}",
        f"recipe       {plan.recipe}",
        f"device       {plan.device}, {_size(plan.memory_bytes)}",
        "",
    ]
    reasons: list[str] = []

    def runs_on(choice: "Choice | None") -> str:
        if choice is None:
            return "none"
        text = str(choice)
        if text not in reasons:
            reasons.append(text)
        return f"{choice.backend} [{reasons.index(text) + 1}]"

    rows = [
        [
            layer.pattern.removesuffix(".weight"),
            str(layer.count),
            f"{layer.outputs} x {layer.inputs}",
            f"W{layer.weight_bits}A{layer.activation_bits}",
            layer.method,
            str(layer.outliers),
            _size(layer.bytes * layer.count),
            runs_on(layer.prefill),
            runs_on(layer.decode),
        ]
        for layer in plan.layers
    ]
    if rows:
        head = ("layer", "count", "N x K", "bits", "method", "outliers", "size", "prefill", "decode")
        lines += [table(head, rows), *(f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)), ""]
    dense = [[row.pattern, str(row.count), " x ".join(map(str, row.shape)), _size(row.bytes * row.count)] for row in plan.dense]
    lines += [table(("not quantized", "count", "shape", "size"), dense), ""]
    quantizing, running = plan.quantizing, plan.running
    lines += [
        f"quantized    {sum(layer.count for layer in plan.layers)} layers, {_size(plan.quantized_bytes)}: "
        f"{plan.bits_per_weight:.2f} bits per weight, {plan.bits_per_weight / 16:.3f} of their size in FP16",
        f"all          {_size(plan.total_bytes)} ({_size(plan.fp16_bytes)} in FP16): quantized layers "
        f"{_size(plan.quantized_bytes)}, other parameters of blocks {_size(plan.dense_block_bytes)}, "
        f"embeddings and head {_size(plan.rest_bytes)}",
        f"to quantize  {_size(quantizing.device)} on the device (a block {_size(quantizing.block)}, work "
        f"{_size(quantizing.work)}; embeddings {_size(quantizing.rest)} before it), {_size(quantizing.host)} of activations in "
        f"host memory ({plan.samples} x {plan.seqlen} tokens"
        + (f", read one sequence at a time from {_size(quantizing.spilled)} on disk" if quantizing.spilled else "")
        + f"): {_verdict(plan.quantizing_fits)}",
        f"to run       {_size(running.total)} with {plan.batch} x {plan.length} tokens (weights "
        f"{_size(running.blocks + running.rest)}, keys and values {_size(running.cache)}, temporaries "
        f"{_size(running.temporaries)}): {_where(plan)}",
    ]
    return "\n".join([*lines, *(f"problem      {problem}" for problem in plan.problems)])


def report(
    artifact: Annotated[Path, typer.Argument(help="The directory that `quantize` wrote.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per layer, not one per kind of layer.")] = False,
    as_json: Json = False,
) -> None:
    """What was quantized and how well, what was not and why, and where it all came from. Reads no weight."""
    from quikjax.cli.app import print_json
    from quikjax.reporting import read_report

    found = read_report(artifact)
    if as_json:
        print_json(found.as_json())
    else:
        print(_report_text(found, layers))


def _report_text(report: "ArtifactReport", every_layer: bool) -> str:
    from quikjax.cli.show import table

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
                f"W{row['weight_bits']}A{row['activation_bits']}",
                row["method"],
                str(row["outliers"]),
                *_error_cells(report, row["relative_error"]),
                "" if row["damping"] is None else f"{row['damping']:g}",
            ]
            for row in report.rows
        ]
        lines += [table(("layer", "N x K", "bits", "method", "outliers", "rel. error", "SNR", "damping"), rows), ""]
    elif report.layers:
        rows = [
            [
                kind.pattern.removesuffix(".weight"),
                str(kind.count),
                f"{kind.outputs} x {kind.inputs}",
                f"W{kind.weight_bits}A{kind.activation_bits}",
                kind.method or "?",
                str(kind.outliers),
                _size(kind.bytes),
                *_error_cells(report, kind.relative_error),
                *_error_cells(report, kind.worst_error)[:1],
                "" if kind.damping is None else f"{kind.damping:g}",
            ]
            for kind in report.layers
        ]
        head = ("layer", "count", "N x K", "bits", "method", "outliers", "size", "rel. error", "SNR", "worst", "damping")
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
        [kind.pattern, str(kind.count), " x ".join(map(str, kind.shape)), kind.dtype, _size(kind.bytes), kind.reason]
        for kind in report.dense
    ]
    sizes = report.sizes
    count = sum(kind.count for kind in report.layers)
    lines += [
        table(("not quantized", "count", "shape", "dtype", "size", "why"), dense),
        "",
        f"quantized    {count} layers; linear layers have {sizes.bits_per_weight:.2f} bits per weight, "
        f"{sizes.relative_to_fp16:.3f} of their size in FP16",
        f"all          {_size(sizes.all_bits // 8)} for {sizes.all_parameters} parameters; {_size(sizes.disk_bytes)} on disk",
    ]
    return "\n".join(lines)


def _error_cells(report: "ArtifactReport", error: float | None) -> list[str]:
    """Relative error and signal-to-noise."""
    if error is None:
        return ["?", "?"]
    decibels = report.snr_db(error)
    return [f"{error:.4f}", "exact" if decibels is None else f"{decibels:.1f} dB"]


def _provenance(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_provenance(entry)}" for name, entry in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verdict(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def _where(plan: "Plan") -> str:
    if plan.devices_needed is None:
        return "does not fit, over any number of such devices"
    return "fits" if plan.fits else f"does not fit; it would over {plan.devices_needed} such devices"


def _size(count: int | float) -> str:
    """Bytes for people, in powers of ten.

    >>> _size(1_500), _size(92_871_040), _size(2.5e9)
    ('1.5 kB', '92.9 MB', '2.50 GB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
