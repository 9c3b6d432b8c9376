"""`quikjax plan`: what will be done to a model, and what it will take. Reads no weight."""

from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.cli.options import (
    BlockSize,
    Context,
    Json,
    Keep,
    Method,
    Outliers,
    Proxy,
    RecipeName,
    Samples,
    SeqLen,
    check_kept,
    check_models,
    choose_recipe,
    parse_activation_memory,
    parse_dtype,
)
from quikjax.cli.printing import print_json, show, size, table, with_clip
from quikjax.errors import QuikError

if TYPE_CHECKING:
    from quikjax.pallas_kernels.choice import Choice
    from quikjax.planning.plan import Plan


def plan(
    model: Annotated[str, typer.Argument(help="A model as `quantize` takes it, or just its config.json. No weight is fetched.")],
    recipe: RecipeName = "quik-4b",
    outliers: Outliers = None,
    block: BlockSize = None,
    proxy: Proxy = None,
    method: Method = None,
    keep: Keep = None,
    batch: Annotated[int, typer.Option(help="Texts at once when the result runs.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens in each; left out, 2048 or the model's context.")] = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    activation_memory: Annotated[
        float | None, typer.Option(help="As `quantize` takes it: GB of memory for activations; left out, a quarter of all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of all that is not quantized.")] = "float32",
    device: Annotated[str, typer.Option(help="here, cpu, h100, h200, a100 or l40s.")] = "here",
    memory: Annotated[float | None, typer.Option(help="GB (10^9 bytes) that one device holds; left out, the device's.")] = None,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Show what quantizing a model will do, and what the result will take, before any weight is read.

    Everything that would go wrong is listed at once; the exit status is then 1.
    """
    check_models(model)
    chosen = choose_recipe(recipe, outliers, block, proxy, method, keep)
    if memory is not None and memory <= 0:
        raise QuikError(f"--memory takes the GB of one device, not {memory:g}")
    activation_bytes = parse_activation_memory(activation_memory)
    floating = parse_dtype(dtype)

    from quikjax.planning.plan import describe, find_device, make_plan

    there, held = find_device(device, None if memory is None else int(memory * 1e9))
    found = describe(model)
    if keep is not None:
        from quikjax.models.registry import abstract_model, dotted, pure_params

        check_kept(keep, dotted(pure_params(abstract_model(found.config, floating, context=context))))
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
        context=context,
    )
    if as_json:
        print_json({"model": model, **made.as_json()})
    else:
        show(_plan_text(model, made))
    if made.problems:
        count = len(made.problems)
        raise QuikError(f"this cannot be quantized so: {count} problem{'s' if count > 1 else ''}, listed with the plan")


def _plan_text(model: str, plan: "Plan") -> str:
    headers = "tensors as its configuration says" if plan.has_headers else "from its configuration alone"
    lines = [
        f"model        {model} ({plan.model_type}, {headers}), activations and unquantized weights in {plan.dtype}",
        f"recipe       {plan.recipe}",
        f"device       {plan.device}, {size(plan.memory_bytes)}",
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
            with_clip(layer.format, layer.level_clip),
            layer.method,
            str(layer.outliers),
            size(layer.bytes * layer.count),
            runs_on(layer.prefill),
            *([runs_on(layer.decode)] if plan.generates else []),
        ]
        for layer in plan.layers
    ]
    if rows:
        columns = ("layer", "count", "N x K", "format", "method", "outliers", "size", "prefill", "decode")
        head = columns if plan.generates else columns[:-1]
        lines += [table(head, rows), *(f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)), ""]
    dense = [[row.pattern, str(row.count), " x ".join(map(str, row.shape)), size(row.bytes * row.count)] for row in plan.dense]
    lines += [table(("not quantized", "count", "shape", "size"), dense), ""]
    quantizing, running = plan.quantizing, plan.running
    lines += [
        f"quantized    {sum(layer.count for layer in plan.layers)} layers, {size(plan.quantized_bytes)}: "
        f"{plan.bits_per_weight:.2f} bits per weight, {plan.bits_per_weight / 16:.3f} of their size in FP16",
        f"all          {size(plan.total_bytes)} ({size(plan.fp16_bytes)} in FP16): quantized layers "
        f"{size(plan.quantized_bytes)}, other parameters of blocks {size(plan.dense_block_bytes)}, "
        f"embeddings and head {size(plan.rest_bytes)}",
        f"to quantize  {size(quantizing.device)} on the device (a block {size(quantizing.block)}, work "
        f"{size(quantizing.work)}; embeddings {size(quantizing.rest)} before it), {size(quantizing.host)} of activations in "
        f"host memory ({plan.samples} x {plan.seqlen} tokens"
        + (f", read one sequence at a time from {size(quantizing.spilled)} on disk" if quantizing.spilled else "")
        + f"): {_verdict(plan.quantizing_fits)}",
        f"to run       {size(running.total)} with {plan.batch} x {plan.length} tokens (weights "
        f"{size(running.blocks + running.rest)}, keys and values {size(running.cache)}, temporaries "
        f"{size(running.temporaries)}): {_where(plan)}",
    ]
    lines += [f"attention    {plan.attention}"]
    lines += _products(plan)
    if plan.advice is not None:
        lines += [f"advice       {plan.advice}"]
    lines += [f"note         {note}" for note in plan.notes]
    return "\n".join([*lines, *(f"problem      {problem}" for problem in plan.problems)])


def _products(plan: "Plan") -> list[str]:
    """An encoder's products, each with what counting says of it in integers and in 16 bits."""
    if not plan.products:
        return []
    rows = [
        [
            ", ".join(product.layers),
            f"{'+'.join(map(str, product.outputs))} x {product.inputs}",
            *(
                f"{ours:.1f} / {theirs:.1f} us: {'integers' if gains else '16 bits'}"
                for ours, theirs, gains in zip(product.integer, product.wide, product.gains, strict=True)
            ),
        ]
        for product in plan.products
    ]
    head = ("product of a block", "N x K", *(f"{tokens} tokens" for tokens in plan.products[0].tokens))
    return [
        "",
        table(head, rows),
        "integers as planned / bf16, and the faster one, by counting kernels, bytes and operations (batch x length tokens; not",
        "measured). To leave a product in 16 bits, give a part of its layers' path: --keep attention.output",
        "",
    ]


def _verdict(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def _where(plan: "Plan") -> str:
    if plan.devices_needed is None:
        return "does not fit, over any number of such devices"
    return "fits" if plan.fits else f"does not fit; it would over {plan.devices_needed} such devices"
