"""Plan a quantization and the size of its result from a model's configuration (and its tensors' headers) alone.

No weight is read and no kernel compiled: a 180B configuration is planned as quickly as a small one.
"""

import dataclasses
import math
from collections import Counter
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
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.pallas_kernels import devices
from quikjax.pallas_kernels.choice import BackendError, Choice, Problem, choose
from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.reference import MAX_BASE
from quikjax.planning.advice import PlannedLayers, advise
from quikjax.planning.attention import AttentionPlan, plan_attention
from quikjax.planning.switches import ProductTimes, product_times
from quikjax.quantizing import memory
from quikjax.quantizing.codebook_rule import CodebookRule, wants_proxies
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.params import abstract_weight
from quikjax.quantizing.proxies import gaps, has_proxies
from quikjax.quantizing.recipe import AnyRule, Recipe, Rule, find_recipe
from quikjax.quantizing.shared_inputs import input_axes
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.linear import explain
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
class LayerPlan:
    """Layers of one kind: equal but for the number of their block, which is `*` in `pattern`.

    `bytes` are those of one layer as stored, everything counted. `prefill` is the backend that reads `batch * length` tokens at
    once, `decode` the one that reads `batch` (of a layer that runs for each token generated); `None` if none can, and then
    `problems` says why.
    """

    pattern: str
    format: str
    count: int
    outputs: int
    inputs: int
    method: str
    weight_bits: int
    activation_bits: int
    level_clip: tuple[int, int] | str | None
    outliers: int
    bytes: int
    prefill: Choice | None
    decode: Choice | None

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePlan:
    """Parameters of one kind that are not quantized. `bytes` are those of one."""

    pattern: str
    count: int
    shape: tuple[int, ...]
    bytes: int
    in_block: bool


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
    samples: int = 16,
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
        samples, seqlen: calibration sequences and their length; 2048 or the model's context.
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
    seqlen = min(2048, context) if seqlen is None else seqlen
    problems = _wrong_numbers(context, batch, length, samples, seqlen)
    if source is not None:
        try:
            match(source, model)
        except QuikError as error:
            problems.append(str(error))
    rows = _Rows(model, recipe, dtype, device, batch, max(length, 1))
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


class _Rows:
    """Every parameter of a model under a recipe, as rows of equal ones, and what is wrong with them."""

    def __init__(self, model: Transformer, recipe: Recipe, dtype: Any, device: Device, batch: int, length: int) -> None:
        self.model, self.dtype, self.device, self.batch, self.length = model, dtype, device, batch, length
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._blocks = {".".join((*model.block_path, key)): block for key, block in model.blocks.items()}
        linear = {
            f"{name}.{layer}.weight": block.decodes(group)
            for name, block in self._blocks.items()
            for group, layers in block.groups.items()
            for layer in layers
        }
        self._idle: set[str] = set()  # patterns of layers that take no part in decoding
        self._params = dotted(pure_params(model))
        # A rule may name a block by its number, so every path is asked; equal answers become one row.
        kinds: Counter[tuple[str, tuple[int, ...], AnyRule | None, int]] = Counter()
        self._rules: dict[str, AnyRule] = {}
        self._outliers: dict[str, int] = {}
        within: set[str] = set()
        for path, leaf in self._params.items():
            pattern, inside = self._pattern(path)
            if inside:
                within.add(pattern)
            rule = recipe.rule_for(path) if inside else None
            # With data, only layers whose input is observed are quantized; without, whatever a rule names inside a block.
            if rule is not None and recipe.needs_data() and path not in linear:
                rule = None
            if not linear.get(path, True):
                self._idle.add(pattern)
            if rule is not None:
                self._rules[path] = rule
                self._outliers[path] = self._outlier_count(rule, path, leaf.shape)
            kinds[pattern, tuple(leaf.shape), rule, self._outliers.get(path, 0)] += 1
        self.layers: list[LayerPlan] = []
        self.dense: list[DensePlan] = []
        for (pattern, shape, rule, outliers), count in kinds.items():
            if rule is None:
                size = dtype.itemsize
                for extent in shape:
                    size *= extent
                in_block = pattern in within
                self.dense.append(DensePlan(pattern=pattern, count=count, shape=shape, bytes=size, in_block=in_block))
            else:
                self._layer(pattern, shape, rule, outliers, count)

    def _pattern(self, path: str) -> tuple[str, str | None]:
        """The path with `*` for the block's number, and what is left within the block (`None` outside blocks)."""
        name = self.model.block_of(path)
        if name is None:
            return path, None
        inside = path.removeprefix(name + ".")
        return f"{name.rpartition('.')[0]}.*.{inside}", inside

    def _outlier_count(self, rule: AnyRule, path: str, shape: tuple[int, ...]) -> int:
        if isinstance(rule, CodebookRule):
            name = self.model.block_of(path)
            assert name is not None
            layer = path.removeprefix(name + ".").removesuffix(".weight")
            group = next((group for group, layers in self._blocks[name].groups.items() if layer in layers), None)
            if not rule.proxy or group is None or not has_proxies(self.model, group, name == next(iter(self._blocks))):
                return 0
        return rule.outlier_count(shape[-1], self.model.config.hidden_size)

    def _layer(self, pattern: str, shape: tuple[int, ...], rule: AnyRule, outliers: int, count: int) -> None:
        try:
            axes = input_axes(pattern, rule, len(shape))
        except QuikError as error:
            self.problems.append(str(error))
            return
        if axes != (1,):
            self.problems.append(f"in_axes {axes} of {pattern}: the inputs of a published weight are its axis 1")
            return
        n, k = shape
        exact = rule.activation_bits < 16
        if outliers >= k:
            self.problems.append(f"{pattern} has {k} input columns, all of which would be outliers; use fewer than {k}")
        elif exact and k - outliers > MAX_BASE:
            self.problems.append(
                f"{pattern} has {k - outliers} base columns; int32 accumulators are exact up to {MAX_BASE}, "
                f"so at least {k - MAX_BASE} must be outliers"
            )
        base = k - outliers
        legal = base > 0 and (base <= MAX_BASE or not exact)
        decodes = legal and self.model.generates and pattern not in self._idle
        made = abstract_weight(rule, shape, base)
        if isinstance(made, CodebookWeight) and made.last_block < made.block:
            self.notes.append(f"blocks of {made.block} do not divide {pattern}: its last block has {made.last_block} weights")
        self.layers.append(
            LayerPlan(
                pattern=pattern,
                format=made.label,
                count=count,
                outputs=n,
                inputs=k,
                method=rule.method,
                weight_bits=rule.weight_bits,
                activation_bits=rule.activation_bits,
                level_clip=None if isinstance(rule, CodebookRule) else rule.level_clip,
                outliers=outliers,
                bytes=made.bits() // 8,
                prefill=self._choose(pattern, shape, rule, base, self.batch * self.length) if legal else None,
                decode=self._choose(pattern, shape, rule, base, self.batch) if decodes else None,
            )
        )

    def _choose(self, pattern: str, shape: tuple[int, ...], rule: AnyRule, base: int, rows: int) -> Choice | None:
        if not isinstance(rule, Rule):
            return explain(abstract_weight(rule, shape, base), rows, self.dtype, device=self.device)
        problem = Problem(
            rows=rows,
            inputs=shape[1],
            outputs=shape[0],
            base=base,
            weight_dtype=jnp.dtype(jnp.int4 if rule.weight_bits == 4 else jnp.int8),
            bits=rule.activation_bits,
            dtype=self.dtype,
            outlier_dtype=jnp.dtype(rule.outlier_dtype),
        )
        try:
            return choose(problem, self.device)
        except BackendError as error:
            self.problems.append(f"{pattern}: {error}")
            return None

    def products(self) -> tuple[ProductTimes, ...]:
        """Times of an encoder's products, by count."""
        shapes = {path: tuple(leaf.shape) for path, leaf in self._params.items()}
        return product_times(self.model, self._rules, self._outliers, shapes, self.device, self.batch * self.length)

    def footprint(self) -> memory.Footprint:
        """Collect what peak memory depends on; of blocks that differ, the largest."""
        groups: dict[tuple[type, str], memory.Group] = {}
        quantized: dict[type, dict[str, memory.Group]] = {}
        shapes = {path: tuple(leaf.shape) for path, leaf in self._params.items()}
        size, packed_weights, packed_bytes, running_bytes = Counter[str](), Counter[str](), Counter[str](), 0
        rest = 0
        for path, leaf in self._params.items():
            name = self.model.block_of(path)
            if name is None:
                rest += leaf.size * self.dtype.itemsize
                continue
            size[name] += leaf.size
            rule = self._rules.get(path)
            if rule is None or len(leaf.shape) != 2:
                running_bytes += leaf.size * self.dtype.itemsize
                continue
            stored = self._held(shapes[path], rule, self._outliers[path])
            packed_weights[name] += leaf.size
            packed_bytes[name] += stored
            running_bytes += stored
        for name, block in self._blocks.items():
            for group, layers in block.groups.items():
                paths = [f"{name}.{layer}.weight" for layer in layers]
                found = memory.Group(shapes[paths[0]][1], tuple(shapes[path][0] for path in paths))
                groups[type(block), group] = found
                if any(path in self._rules for path in paths):
                    quantized.setdefault(type(block), {})[group] = found
        # Of two kinds of block, that whose layers read more.
        most = max(quantized.values(), key=lambda of: sum(group.inputs for group in of.values()), default={})
        return memory.Footprint(
            config=self.model.config,
            itemsize=self.dtype.itemsize,
            groups=tuple(groups.values()),
            quantized=tuple(most.values()),
            block_parameters=max(size.values()),
            block_quantized=max(packed_weights.values(), default=0),
            block_packed=max(packed_bytes.values(), default=0),
            block_bytes=running_bytes,
            rest_bytes=rest,
            dequantized=max(
                (
                    sum(
                        self.dtype.itemsize * math.prod(shapes[path])
                        for path in (f"{name}.{layer}.weight" for layer in layers)
                        if isinstance(self._rules.get(path), CodebookRule | GroupRule)
                    )
                    for name, block in self._blocks.items()
                    for layers in block.groups.values()
                ),
                default=0,
            ),
        )

    def _held(self, shape: tuple[int, ...], rule: AnyRule, outliers: int) -> int:
        """Bytes of a packed weight in the device's memory: as stored, sparse codes expanded; on a CPU a code has a byte."""
        base = shape[1] - outliers
        if isinstance(rule, Rule) and rule.sparsity is not None:
            rule = rule.model_copy(update={"sparsity": None})
        unpacked = isinstance(rule, Rule) and self.device.platform == "cpu"
        wider = shape[0] * base * (8 - rule.weight_bits) // 8 if unpacked else 0
        return abstract_weight(rule, shape, base).bits() // 8 + wider
