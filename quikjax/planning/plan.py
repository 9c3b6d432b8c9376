"""Plan a quantization and the size of its result from a model's configuration (and its tensors' headers) alone.

No weight is read and no kernel compiled: a 180B configuration is planned as quickly as a small one.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from quikjax.errors import QuikError, did_you_mean
from quikjax.files import read_json, user_path
from quikjax.loading import Source, match
from quikjax.loading.formats import ARTIFACT_FILE, open_found
from quikjax.loading.locate import DEMO_MODELS, Found, resolve
from quikjax.models.base import Transformer
from quikjax.models.dtypes import floating_dtype
from quikjax.models.memory import device_memory, physical_memory
from quikjax.models.registry import abstract_model
from quikjax.pallas_kernels import devices
from quikjax.pallas_kernels.devices import Device
from quikjax.planning.advice import PlannedLayers, advise
from quikjax.planning.attention import AttentionPlan, plan_attention
from quikjax.planning.rows import DensePlan, LayerPlan, Rows
from quikjax.planning.switches import ProductTimes
from quikjax.quantizing import memory
from quikjax.quantizing.calibration import calibration_size
from quikjax.quantizing.codebook_rule import wants_proxies
from quikjax.quantizing.proxies import gaps
from quikjax.quantizing.recipe import Recipe, Rule, find_recipe
from quikjax.weights.sparse import EXPANDED

# Devices that can be planned for without having one, and the bytes they are sold with.
DEVICES: dict[str, tuple[Device, int | None]] = {
    "cpu": (devices.CPU, None),
    "h100": (devices.H100, 80 * 10**9),
    "h200": (Device("gpu", "NVIDIA H200", (9, 0), 132), 141 * 10**9),
    "a100": (devices.A100, 80 * 10**9),
    "l40s": (devices.L40S, 48 * 10**9),
}
_WEIGHTS = ("*.safetensors", "*.msgpack", "*.gguf")


class Described(NamedTuple):
    """A published configuration, and the opened checkpoint where its weights are there too."""

    config: dict[str, Any]
    source: Source | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole plan. `problems` are sentences; with any of them, quantizing would fail. `notes` are sentences too.

    `memory_bytes` is what one device holds, `devices_needed` over how many of them the result runs (`None`: not over any number),
    `has_headers` whether tensors' headers were compared with the configuration, `advice` which recipe suits the device and why.
    `generates` is false of an encoder, which decodes nothing and keeps no keys and values. `products` are those of an encoder's
    block with their predicted times, none on devices that there are no counts for.
    """

    model_type: str
    recipe: str
    dtype: str
    batch: int
    length: int
    samples: int
    seqlen: int
    device: Device
    memory_bytes: int
    has_headers: bool
    layers: tuple[LayerPlan, ...]
    dense: tuple[DensePlan, ...]
    quantizing: memory.Quantizing
    running: memory.Running
    devices_needed: int | None
    generates: bool
    attention: AttentionPlan
    problems: tuple[str, ...]
    products: tuple[ProductTimes, ...] = ()
    advice: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def quantized_weights(self) -> int:
        """The number of weights in quantized layers."""
        return sum(layer.count * layer.outputs * layer.inputs for layer in self.layers)

    @property
    def quantized_bytes(self) -> int:
        """Of all quantized layers, as stored."""
        return sum(layer.count * layer.bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, everything counted; 16 where nothing is quantized."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else 16.0

    @property
    def dense_block_bytes(self) -> int:
        """Of what stays unquantized inside blocks."""
        return sum(row.count * row.bytes for row in self.dense if row.in_block)

    @property
    def rest_bytes(self) -> int:
        """Of embeddings, head and last norm."""
        return sum(row.count * row.bytes for row in self.dense if not row.in_block)

    @property
    def total_bytes(self) -> int:
        """Of the whole artifact, uncompressed."""
        return self.quantized_bytes + self.dense_block_bytes + self.rest_bytes

    @property
    def fp16_bytes(self) -> int:
        """Of the whole model in 16 bits."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return 2 * (self.quantized_weights + (self.dense_block_bytes + self.rest_bytes) // itemsize)

    @property
    def fits(self) -> bool:
        """True if the result runs on one device."""
        return self.devices_needed == 1

    @property
    def quantizing_fits(self) -> bool:
        """True if quantizing fits the device; on a CPU its memory holds the activations too."""
        need = self.quantizing
        return need.device + (need.host if self.device.platform == "cpu" else 0) <= self.memory_bytes

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            **{name: getattr(self, name) for name in ("model_type", "recipe", "dtype", "batch", "length", "samples", "seqlen")},
            "device": str(self.device),
            "memory_bytes": self.memory_bytes,
            "has_headers": self.has_headers,
            "layers": [layer.as_json() for layer in self.layers],
            "unquantized": [dataclasses.asdict(row) for row in self.dense],
            "quantized_layers": sum(layer.count for layer in self.layers),
            "bits_per_weight": self.bits_per_weight,
            "size_relative_to_fp16": self.bits_per_weight / 16,
            "quantized_bytes": self.quantized_bytes,
            "unquantized_bytes": self.dense_block_bytes,
            "embeddings_and_head_bytes": self.rest_bytes,
            "total_bytes": self.total_bytes,
            "fp16_bytes": self.fp16_bytes,
            "quantizing": {**self.quantizing._asdict(), "device": self.quantizing.device, "host": self.quantizing.host},
            "running": {**self.running._asdict(), "total": self.running.total},
            "quantizing_fits": self.quantizing_fits,
            "fits": self.fits,
            "devices_needed": self.devices_needed,
            "generates": self.generates,
            "attention": dataclasses.asdict(self.attention),
            "problems": list(self.problems),
            "products": [{**dataclasses.asdict(product), "gains": product.gains} for product in self.products],
            "advice": self.advice,
            "notes": list(self.notes),
        }


def describe(model: str | Path) -> Described:
    """The configuration that `model` names, and its checkpoint if the weights are there. Weights are never downloaded.

    Args:
        model: what `open_source` takes; also a `config.json`, or a directory that has nothing but one.

    Raises:
        QuikError: there is nothing of this name, it is an artifact of ours, or its files are damaged.
    """
    path = user_path(model)
    if path.suffix == ".json" and path.is_file():
        return Described(read_json(path), None)
    found = Found(path) if path.is_dir() and str(model) not in DEMO_MODELS else resolve(model, weights=False)
    if (found.path / ARTIFACT_FILE).is_file():
        name = model if found.revision is not None else found.path
        raise QuikError(f"{name} is quantized already; see what was done with: quikjax report {name}")
    config = found.path / "config.json"
    if config.is_file() and not any(True for pattern in _WEIGHTS for _ in found.path.glob(pattern)):
        return Described(read_json(config), None)
    source = open_found(found)
    return Described(source.config, source)


def find_device(name: str, memory_bytes: int | None = None) -> tuple[Device, int]:
    """A device by name ("here": this process's), and its memory in bytes unless that is given.

    Raises:
        QuikError: no device has this name.
    """
    if name == "here":
        return devices.current_device(), memory_bytes or device_memory()
    if name.lower() not in DEVICES:
        raise QuikError(f'there is no device "{name}" to plan for; {did_you_mean(name, ["here", *DEVICES])}')
    device, sold = DEVICES[name.lower()]
    return device, memory_bytes or sold or physical_memory()


def make_plan(
    config: Mapping[str, Any],
    recipe: Recipe | str = "quik-4b",
    *,
    source: Source | None = None,
    dtype: Any = jnp.float32,
    batch: int = 1,
    length: int | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    activation_bytes: int | None = None,
    device: Device = devices.CPU,
    memory_bytes: int,
    context: int | None = None,
) -> Plan:
    """Plan the quantization of the model that `config` describes, and running the result.

    Args:
        config: a published `config.json`.
        recipe: what to do, or a recipe's name.
        source: the checkpoint; its headers are then compared with the configuration.
        dtype: of activations and of what stays unquantized.
        batch, length: texts at once, and tokens in each (prompt and continuation) when it runs; 2048 or the model's context.
        samples, seqlen: calibration sequences and their length; left out, as `quantizing.calibration.calibration_size` has it.
        activation_bytes: of host memory for activations; left out, a quarter of this machine's. What takes more is on disk.
        device, memory_bytes: where it runs, and what one such device holds.
        context: longest text in tokens, in place of what the configuration declares.

    Raises:
        QuikError: the configuration is not one of a known model, or there is no such recipe. Everything else that is wrong is
            in the plan's `problems`, all at once.
    """
    recipe, dtype = find_recipe(recipe), floating_dtype(dtype)
    model = abstract_model(config, dtype, context=context)
    context = model.config.context_length
    length = min(2048, context) if length is None else length
    samples, seqlen = calibration_size(model, samples, seqlen)
    problems = _wrong_numbers(context, batch, length, samples, seqlen)
    if source is not None:
        try:
            match(source, model)
        except QuikError as error:
            problems.append(str(error))
    rows = Rows(model, recipe, dtype, device, batch, max(length, 1))
    if recipe.rules and not rows.layers:
        problems.append(f'recipe "{recipe.name}" matches no layer of this model; its rules name other paths')
    footprint = rows.footprint()
    tokens = samples if recipe.needs_data() else 0
    run = memory.running(footprint, batch, length)
    gptq = any(layer.method == "gptq" for layer in rows.layers)
    budget = memory.default_activation_bytes() if activation_bytes is None else activation_bytes
    descent = any(rule.sweeps for rule in recipe.rules)
    distills = recipe.distillation is not None
    quantizing = memory.quantizing(
        footprint, tokens, seqlen, gptq=gptq, descent=descent, distills=distills, activation_budget=budget
    )
    if problem := memory.budget_problem(quantizing.activations, budget):
        problems.append(problem)
    made = Plan(
        model_type=str(config["model_type"]),
        recipe=recipe.name,
        dtype=dtype.name,
        batch=batch,
        length=length,
        samples=tokens,
        seqlen=seqlen,
        device=device,
        memory_bytes=memory_bytes,
        has_headers=source is not None,
        layers=tuple(rows.layers),
        dense=tuple(rows.dense),
        quantizing=quantizing,
        running=run,
        devices_needed=memory.devices_needed(run, memory_bytes, model.config),
        generates=model.generates,
        attention=plan_attention(model.config, device, dtype, max(batch, 1), max(length, 1), model.generates),
        products=rows.products(),
        problems=(*problems, *rows.problems),
        notes=(*_notes(recipe, model), *rows.notes),
    )
    planned = [PlannedLayers(row.pattern, row.count, row.outputs, row.inputs, row.activation_bits) for row in made.layers]
    advice = advise(device, recipe, planned, model.config.hidden_size, made.bits_per_weight, encoder=not made.generates)
    return dataclasses.replace(made, advice=advice)


def _wrong_numbers(context: int, batch: int, length: int, samples: int, seqlen: int) -> list[str]:
    given = {"--batch": batch, "--length": length, "--samples": samples, "--seqlen": seqlen}
    wrong = [f"{name} must be at least 1, not {value}" for name, value in given.items() if value < 1]
    return wrong + [
        f"{name} {given[name]} exceeds the model's context of {context} tokens"
        for name in ("--length", "--seqlen")
        if given[name] > context
    ]


def _notes(recipe: Recipe, model: Transformer) -> tuple[str, ...]:
    """Notes: no problems, but good to know before it begins."""
    notes = [f"no proxy outliers for {gap}" for gap in gaps(model)] if wants_proxies(recipe.rules) else []
    if any(isinstance(rule, Rule) and rule.sparsity is not None for rule in recipe.rules):
        notes.append(EXPANDED)
    if (distillation := recipe.distillation) is not None:
        notes.append(
            f"each block learns from its original in {distillation.steps} steps of {distillation.batch} calibration "
            f"sequence{'s' if distillation.batch > 1 else ''}: most of the time of quantizing"
        )
    return tuple(notes)
